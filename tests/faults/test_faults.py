"""The campaigns of `make faults` in a form that takes seconds."""
import pytest

from .campaigns import CAMPAIGNS, run


@pytest.mark.parametrize('title, campaign, num', [(t, c, few) for t, c, _, few in CAMPAIGNS],
                         ids=[title for title, *_ in CAMPAIGNS])
def test_nothing_is_lost(title, campaign, num, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    tried, lost, _ = run(campaign, num, seed=1)
    assert tried >= num and not lost, '\n'.join(lost[:10])
