"""k-NN against numpy, features against the backbone, and the tool."""
from itertools import chain

import numpy as np
import pytest
import torch
from mmengine.config import Config
from mmengine.registry import MODELS
from mmengine.runner import Runner

from nepa_mm.evaluation.frozen_features import extract_features, knn_accuracy, knn_scores

from .conftest import REPO
from .tiny_runs import load_tool

FINETUNE = REPO / 'configs' / 'demo' / 'digits_finetune.py'


@pytest.fixture
def digits():
    """An untrained network and a loader of 50 digits."""
    torch.manual_seed(0)
    cfg = Config.fromfile(FINETUNE)
    cfg.test_dataloader.dataset.num_labels = 50
    cfg.model.backbone.init_cfg = None
    return MODELS.build(cfg.model), Runner.build_dataloader(cfg.test_dataloader)


def test_scores_against_numpy():
    rng = np.random.default_rng(0)
    bank, queries = rng.normal(size=(40, 6)), rng.normal(size=(11, 6))
    labels = rng.integers(0, 3, 40)
    expected = np.zeros((11, 3))
    for row, query in zip(expected, queries):
        cosine = bank @ query / np.linalg.norm(bank, axis=1) / np.linalg.norm(query)
        for i in np.argsort(-cosine)[:7]:
            row[labels[i]] += np.exp(cosine[i] / 0.2)
    scores = knn_scores(torch.tensor(bank), torch.tensor(labels), torch.tensor(queries), 3, k=7,
                        temperature=0.2, chunk=4)
    np.testing.assert_allclose(scores, expected)


@pytest.mark.parametrize('feature', ['avg_featmap', 'last_token', 'cls_token'])
@pytest.mark.parametrize('block', [0, -1])
def test_features(digits, feature, block):
    """Evaluation mode, the block and the pooling that were asked for, mode restored."""
    model, loader = digits
    model.train()
    features, labels = extract_features(model, loader, feature, block)
    assert model.training and features.shape == (50, 96)
    model.eval()
    batch = model.data_preprocessor(next(iter(loader)))
    tokens = model.backbone.encode(*model.backbone.embed(batch['inputs']), [block])[0]
    expected = dict(avg_featmap=tokens[:, 1:].mean(1), last_token=tokens[:, -1],
                    cls_token=tokens[:, 0])[feature]
    assert torch.equal(features, expected)
    assert labels.tolist() == [int(sample.gt_label) for sample in batch['data_samples']]


def test_accuracy_of_known_answers(digits):
    """One neighbour in the own bank gives the bank's label: right, or wrong where those are."""
    model, loader = digits
    assert knn_accuracy(model, loader, loader, k=1) == dict(top1=100, top5=100)
    wrong = list(loader)
    for sample in chain(*(batch['data_samples'] for batch in wrong)):
        sample.set_gt_label((sample.gt_label + (sample.gt_label < 3)) % 10)
    right = np.mean([label >= 3 for label in extract_features(model, loader)[1]])
    assert 0 < right < 1
    assert knn_accuracy(model, wrong, loader, k=1)['top1'] == pytest.approx(100 * right)


def test_refusals(digits):
    model, loader = digits
    with pytest.raises(ValueError, match="feature must be one of .* got 'mean'"):
        extract_features(model, loader, 'mean')
    with pytest.raises(ValueError, match=r'out_indices must be in \[-4, 3\] .* got 9'):
        extract_features(model, loader, block=9)
    with pytest.raises(ValueError, match='positive, got 0 and 0.07'):
        knn_scores(torch.ones(1, 2), torch.zeros(1), torch.ones(1, 2), 1, k=0)


def test_tool(digits, tmp_path, capsys):
    model, loader = digits
    torch.save(dict(state_dict=model.state_dict()), tmp_path / 'model.pth')
    main = load_tool('knn').main
    argv = [str(FINETUNE), str(tmp_path / 'model.pth'), '--block', '0', '--feature', 'last_token',
            '-k', '5', '--cfg-options', 'test_dataloader.dataset.num_labels=50']
    accuracy = main(argv)
    line = capsys.readouterr().out.strip().split('\n')[-1]
    assert '5-NN on last_token of block 0 (of 0 to 3)' in line
    assert f'{accuracy["top1"]:.2f} %' in line
    cfg = Config.fromfile(FINETUNE)
    cfg.train_dataloader.dataset.pipeline = cfg.test_dataloader.dataset.pipeline
    bank = Runner.build_dataloader(dict(cfg.train_dataloader, drop_last=False))
    assert accuracy == knn_accuracy(model, bank, loader, 'last_token', block=0, k=5)
    assert accuracy != knn_accuracy(model, bank, loader, 'last_token', block=-1, k=5)
    for (config, checkpoint, *flags), message in (
            ((FINETUNE, 'nowhere.pth'), "The checkpoint 'nowhere.pth', given as"),
            ((FINETUNE.with_name('digits_pretrain.py'), argv[1]), 'no labelled train_dataloader'),
            ((FINETUNE, argv[1], '--temperature', '0'), 'positive, got 20 and 0.0')):
        with pytest.raises(SystemExit):
            main([str(config), checkpoint, *flags])
        assert message in capsys.readouterr().err
