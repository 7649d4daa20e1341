"""k-NN against numpy, features against the backbone, and the tool."""
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
    """Its own bank is answered perfectly with one neighbour; shuffled labels are not."""
    model, loader = digits
    assert knn_accuracy(model, loader, loader, k=1) == dict(top1=100, top5=100)


def test_refusals(digits):
    model, loader = digits
    with pytest.raises(ValueError, match="feature must be one of .* got 'mean'"):
        extract_features(model, loader, 'mean')
    with pytest.raises(ValueError, match=r'out_indices must be in \[-4, 3\] .* got 9'):
        extract_features(model, loader, block=9)
    with pytest.raises(ValueError, match='positive, got 0 and 0.07'):
        knn_scores(torch.ones(1, 2), torch.zeros(1), torch.ones(1, 2), 1, k=0)


def test_tool(digits, tmp_path, capsys):
    model, _ = digits
    torch.save(dict(state_dict=model.state_dict()), tmp_path / 'model.pth')
    main = load_tool('knn').main
    argv = [str(FINETUNE), str(tmp_path / 'model.pth'), '--block', '0', '--feature', 'last_token',
            '-k', '5', '--cfg-options', 'test_dataloader.dataset.num_labels=50']
    accuracy = main(argv)
    line = capsys.readouterr().out.strip().split('\n')[-1]
    assert '5-NN on last_token of block 1 of 4' in line and f'{accuracy["top1"]:.2f} %' in line
    for config, checkpoint, message in (
            (FINETUNE, 'nowhere.pth', "The checkpoint 'nowhere.pth', given as"),
            (FINETUNE.with_name('digits_pretrain.py'), argv[1], 'no labelled train_dataloader')):
        with pytest.raises(SystemExit):
            main([str(config), checkpoint])
        assert message in capsys.readouterr().err
