"""nepa_mm.load: the Runner's network and images, bit for bit, from every kind of file."""
import copy
import pickle
from pathlib import Path

import numpy as np
import pytest
import torch
from mmengine.config import Config
from mmengine.registry import MODELS, init_default_scope
from mmengine.runner import Runner
from PIL import Image

import nepa_mm
from nepa_mm.apis.load import CONFIGS
from nepa_mm.apis.recorded_network import check_types
from nepa_mm.checkpoints.huggingface import to_published
from nepa_mm.checkpoints.huggingface_config import DEFAULTS
from nepa_mm.checkpoints.io import save_weights
from nepa_mm.datasets.images import decode_image, pixels_of
from nepa_mm.datasets.pipelines import use_one_reader

from .conftest import TINY
from .test_convert import SMALL, build, write_published
from .tiny_runs import (
    load_tool,
    options,
    run_test,
    run_train,
    save_classifier,
    save_image,
    save_pretraining,
    save_segmentor,
)

EMA = "custom_hooks=[dict(type='ModelEMAHook',momentum=0.5)]"


@pytest.fixture(autouse=True)
def in_folder(folder):
    """Every test runs in an empty folder."""


def train(config, *settings, epochs=1):
    run_train([config, '--work-dir', 'work', '--no-resume', *options(
        'model.backbone.layer_scale_init_value=0.5', 'optim_wrapper.optimizer.lr=0.5', EMA,
        f'train_cfg.max_epochs={epochs}', *settings)])
    return f'work/epoch_{epochs}.pth'


def runner_of(config, checkpoint, monkeypatch, *flags):
    """The Runner of tools/test.py, with its weights loaded, and the inputs of its first batch."""
    seen = []
    monkeypatch.setattr(Runner, 'test', lambda self: seen.append(self) or {})
    run_test([config, checkpoint, '--work-dir', 'work_test', *flags])
    runner, = seen
    model, dataset = runner.model.eval(), runner.test_loop.dataloader.dataset
    batch = next(iter(runner.test_loop.dataloader))
    return model, model.data_preprocessor(batch)['inputs'], dataset


@pytest.mark.parametrize('weights', ['ema', 'raw', None])
def test_pretraining_run(weights):
    checkpoint = train(save_pretraining())
    model = nepa_mm.load(checkpoint, weights=weights)
    assert type(model) is nepa_mm.NEPA and not any(m.training for m in model.modules())

    cfg = Config.fromfile('pretrain.py')
    cfg.model.backbone.layer_scale_init_value = 0.5
    reference = MODELS.build(cfg.model).eval()
    saved = torch.load(checkpoint, weights_only=False)
    state = saved['state_dict']
    if weights == 'raw':
        state = {k.removeprefix('module.'): v for k, v in saved['ema_state_dict'].items()
                 if k != 'steps'}
    reference.load_state_dict(state)
    x = torch.randn(2, 3, 28, 42)
    assert torch.equal(model(x, mode='loss')['loss'], reference(x, mode='loss')['loss'])
    assert torch.equal(model.backbone(x)[0], reference.backbone(x)[0])
    different = saved['state_dict']['backbone.cls_token'] != saved['ema_state_dict'][
        'module.backbone.cls_token']
    assert different.any()      # the two sets can be told apart
    # resized and cropped to the training size
    save_image(Path('odd.png'), (50, 31))
    image = model.transform('odd.png')
    assert image.shape == (3, 28, 28) and image.dtype == torch.float32
    assert torch.isfinite(model(image[None], mode='loss')['loss'])


@pytest.mark.parametrize('weights', ['ema', 'raw'])
def test_fine_tuned_run(monkeypatch, weights):
    config, _ = save_classifier()
    checkpoint = train(config)
    reference, inputs, dataset = runner_of(
        config, checkpoint, monkeypatch, '--weights', weights,
        *options('model.backbone.layer_scale_init_value=0.5'))
    model = nepa_mm.load(checkpoint, weights=weights)
    paths = [dataset.get_data_info(i)['img_path'] for i in range(len(inputs))]
    ours = torch.stack([model.transform(path) for path in paths])
    assert torch.equal(ours, inputs)
    assert torch.equal(model(ours), reference(inputs))
    assert torch.equal(model(ours, mode='tensor'), reference(inputs, mode='tensor'))
    assert model.dataset_meta['classes'] == list('abcde')
    scores = model.predict(ours)[0].pred_score
    assert scores.shape == (5,)
    assert torch.equal(nepa_mm.load(config, checkpoint, weights=weights)(ours), model(ours))
    # state dict and workers are those of any module
    assert model.state_dict().keys() == reference.state_dict().keys()
    assert torch.equal(pickle.loads(pickle.dumps(model.transform))(paths[0]), ours[0])
    assert torch.equal(copy.deepcopy(model)(ours), model(ours))


def test_segmentor_run(monkeypatch):
    config, _ = save_segmentor()
    checkpoint = train(config, epochs=3)
    reference, inputs, dataset = runner_of(
        config, checkpoint, monkeypatch,
        *options('model.backbone.layer_scale_init_value=0.5'))
    model = nepa_mm.load(checkpoint)
    path = dataset.get_data_info(0)['img_path']
    ours = model.transform(Image.open(path))[None]
    assert torch.equal(ours, inputs)
    assert torch.equal(model(ours), reference(inputs))
    assert model.dataset_meta['classes'] == ['background', 'corner']


def test_keep_ratio_and_padding(monkeypatch):
    """The pipeline of ADE20K: sides that vary, padded for the network by the preprocessor."""
    config, checkpoint = save_segmentor()
    cfg = Config.fromfile(config)
    cfg.model.update(type='NEPASegmentor')
    cfg.model.data_preprocessor.test_cfg = dict(size_divisor=14)
    cfg.test_dataloader.dataset.pipeline[1] = dict(type='Resize', scale=(112, 28), keep_ratio=True)
    cfg.custom_imports.imports.append('nepa_mm.models.segmentors')
    cfg.dump('ratio.py')
    save_image(Path('data/images/0.jpg'), (61, 33))
    Image.fromarray(np.zeros((33, 61), np.uint8)).save('data/labels/0.png')
    reference, inputs, dataset = runner_of('ratio.py', checkpoint, monkeypatch)
    model = nepa_mm.load('ratio.py', checkpoint)
    ours = model.transform(dataset.get_data_info(0)['img_path'])[None]
    assert ours.shape == (1, 3, 28, 56) and torch.equal(ours, inputs)
    assert torch.equal(model(ours), reference(inputs))


def test_published(monkeypatch):
    """Files of publish_model and folders of convert_checkpoint give the same as the run."""
    config, _ = save_classifier()
    cfg = Config.fromfile(config)       # sizes differ from the defaults, as does the preprocessing
    cfg.test_dataloader.dataset.pipeline[1:2] = [
        dict(type='ResizeEdge', scale=35, interpolation='bicubic', backend='pillow'),
        dict(type='CenterCrop', crop_size=28)]
    cfg.model.data_preprocessor = dict(mean=[120., 110, 100], std=[60., 61, 62], to_rgb=True)
    cfg.model.backbone.fc_norm = True
    cfg.dump('own.py')
    checkpoint = train('own.py')
    run = nepa_mm.load(checkpoint)
    file = load_tool('publish_model').main([checkpoint, 'mine'])
    load_tool('convert_checkpoint').main([checkpoint, 'folder', '--to', 'hf'])
    save_image(Path('odd.png'), (50, 61))
    x = run.transform('odd.png')[None]
    for path in (file, 'folder', Path('folder'), 'folder/model.safetensors'):
        model = nepa_mm.load(path)
        assert torch.equal(model.transform('odd.png')[None], x), path
        assert torch.equal(model(x), run(x)), path
        assert model.dataset_meta['classes'] == list('abcde')
        batch = dict(inputs=torch.randint(256, (2, 3, 28, 28), dtype=torch.uint8))
        assert torch.equal(model.data_preprocessor(batch)['inputs'],
                           run.data_preprocessor(batch)['inputs'])


def test_authors_format():
    """A folder without our entries: the authors' evaluation."""
    config = DEFAULTS | SMALL | dict(qk_norm=True, image_size=56, num_channels=3)
    ours = build(config, None)
    write_published(Path('authors'), config, to_published(ours.state_dict()))
    model = nepa_mm.load('authors')
    x = torch.randn(1, 3, 56, 70)
    assert torch.equal(model.backbone(x)[0], ours.backbone(x)[0])
    save_image(Path('a.png'), (100, 80))
    image = model.transform('a.png')
    assert image.shape == (3, 56, 56) and -1 <= image.min() < image.max() <= 1
    Path('authors/config.json').unlink()
    with pytest.raises(FileNotFoundError, match='no config.json'):
        nepa_mm.load('authors')
    with pytest.raises(FileNotFoundError, match='need their config.json'):
        nepa_mm.load('authors/model.safetensors')


def test_names(capsys):
    """Of the package's configs; a path works, too; without a checkpoint the network is fresh."""
    with pytest.warns(UserWarning, match='nepa_vit-s_imagenette has no weights'):
        fresh = nepa_mm.load('nepa_vit-s_imagenette')
    assert capsys.readouterr() == ('', '')      # the warning is the only word
    save_weights(fresh.state_dict(), 'x.safetensors')
    for name in ('nepa_vit-s_imagenette', 'nepa_vit-s_imagenette.py',
                 'pretrain/nepa_vit-s_imagenette',
                 str(CONFIGS / 'pretrain/nepa_vit-s_imagenette.py')):
        model = nepa_mm.load(name, 'x.safetensors')
        assert torch.equal(model.backbone.cls_token, fresh.backbone.cls_token)
    before = torch.random.get_rng_state()
    with pytest.warns(UserWarning, match='digits_finetune has no weights'):
        nepa_mm.load('digits_finetune')
    assert torch.equal(before, torch.random.get_rng_state())


def test_test_time_augmentation():
    """The network inside; several views of an image are no tensor."""
    name = 'nepa_vit-b_upernet_160k_ade20k-512x512_ms-flip'
    with pytest.warns(UserWarning, match='no weights'), \
            pytest.warns(UserWarning, match='TestTimeAug'):
        model = nepa_mm.load(name)
    assert type(model).__name__ == 'NEPASegmentor' and model.transform is None


def record(**changes):
    """A file of the class of a run, with the config of the classifier changed."""
    save_classifier()
    cfg = Config.fromfile('classify.py')
    cfg.merge_from_dict(changes)
    init_default_scope('mmpretrain')
    state = MODELS.build(Config.fromfile('classify.py').model).state_dict()
    torch.save(dict(state_dict=state, meta=dict(cfg=cfg.pretty_text)), 'recorded.pth')
    return 'recorded.pth'


@pytest.mark.parametrize('changes', [
    {'model.head': dict(type='subprocess.run', args=['touch', 'owned'])},
    {'model.head.loss': dict(type='os.system', command='touch owned')},
    {'model.head.type': 'mmpretrain.apis.get_model'},
    {'model.backbone.act_cfg': dict(type='antigravity')},
    {'model.backbone.type': 'BLIP2VQA'},
    {'model.data_preprocessor.type': 'mmengine.fileio.get'},
    {'model.head.loss': dict(type='CrossEntropyLoss', class_weight='owned.pkl')},
    {'model.head.type': 'VQAGenerationHead'}, {'model.type': 'HuggingFaceClassifier'},
    {'model.backbone._scope_': 'antigravity'},
    {'test_dataloader.dataset.pipeline': [dict(type='subprocess.run', args=['touch', 'owned'])]}])
def test_a_record_builds_known_classes_only(changes, recwarn):
    path = record(**changes)
    if 'pipeline' in str(changes):      # the weights are useful without it
        model = nepa_mm.load(path)
        assert model.transform is None
        assert 'subprocess.run' in str(recwarn.pop(UserWarning).message)
        with pytest.raises(ValueError, match='no transform'):
            nepa_mm.features(model, ['data/val/a/0.jpg'])
    else:
        with pytest.raises(ValueError, match='name the config as well') as error:
            nepa_mm.load(path)
        assert '\n' not in str(error.value)
    assert not Path('owned').exists()


def test_records_of_all_configs_are_built():
    """What the recipes of this package record is among the known classes."""
    for file in CONFIGS.rglob('*.py'):
        if '_base_' not in file.parts:
            cfg = Config.fromfile(file).to_dict()
            if 'module' in cfg['model']:        # for tests only; trains nothing
                assert cfg['model']['type'] == 'SegTTAModel'
                continue
            if file.stem.endswith('_mae'):      # the baseline's network is mmpretrain's
                with pytest.raises(ValueError, match='is not built from a record'):
                    check_types(cfg['model'], file.name, cfg.get('default_scope'))
                continue
            check_types(cfg['model'], file.name, cfg.get('default_scope'))
            check_types(cfg.get('data_preprocessor'), file.name)


@pytest.mark.parametrize('changes', [
    {'model.backbone.arch': dict(TINY, num_layers=10 ** 9)},
    {'model.backbone.arch': dict(TINY, feedforward_channels=10 ** 7)},
    {'model.head.num_classes': 10 ** 8}, {'model.backbone.nonsense': 1}])
def test_a_record_of_another_network(changes):
    with pytest.raises(ValueError, match='recorded.pth') as error:
        nepa_mm.load(record(**changes))
    assert '\n' not in str(error.value)


def test_refusals():
    save_weights(dict(a=torch.zeros(1)), 'bare.safetensors')
    Path('broken.pth').write_bytes(b'PK no')
    for args, kind, message in (
            (['nowhere.pth'], FileNotFoundError, "'nowhere.pth', given as .* does not exist"),
            (['nepa_vit-x'], ValueError, "No config .*'nepa_vit-x'.*Did you mean nepa_vit-"),
            (['nepa_vit-b', 'nowhere.pth'], FileNotFoundError, 'nowhere.pth'),
            (['nowhere.py'], FileNotFoundError, 'nowhere.py'),
            (['broken.pth'], ValueError, 'not a checkpoint that can be read'),
            (['bare.safetensors'], ValueError, r'records no config.*load\(CONFIG, '),
            (['digits_finetune', 'bare.safetensors'], ValueError, 'No tensor of bare'),
            ([3], ValueError, 'got 3')):
        with pytest.raises(kind, match=message) as error:
            nepa_mm.load(*args)
        assert '\n' not in str(error.value)
    with pytest.raises(ValueError, match="weights must be .* got 'swa'"):
        nepa_mm.load('bare.safetensors', weights='swa')
    with pytest.raises(ValueError, match="device 'gpu'"):
        nepa_mm.load('bare.safetensors', device='gpu')


MODES = dict(
    rgb=lambda i: i, grey=lambda i: i.convert('L'), cmyk=lambda i: i.convert('CMYK'),
    palette=lambda i: i.convert('P'), alpha=lambda i: i.convert('RGBA'),
    one_bit=lambda i: i.convert('1'),
    deep=lambda i: Image.fromarray(np.asarray(i.convert('L')).astype(np.uint16) * 257))
SUFFIX = dict(cmyk='jpg')


@pytest.mark.parametrize('mode', MODES)
def test_pixels_of_an_image_and_of_its_file(mode):
    """An open image, its copy in memory and the file are read alike: EXIF, CMYK, 16 bit."""
    save_image(Path('a.png'), (33, 21))
    image, exif = MODES[mode](Image.open('a.png')), Image.Exif()
    exif[0x0112] = 6
    path = Path(f'b.{SUFFIX.get(mode, "png")}')
    image.save(path, exif=exif)
    for color_type in ('color', 'grayscale', 'unchanged'):
        expected = decode_image(path.read_bytes(), path, color_type)
        assert expected.shape[:2] == (33, 21)
        opened = Image.open(path)
        assert np.array_equal(pixels_of(opened, color_type), expected)
        opened.load()
        assert np.array_equal(pixels_of(opened.copy(), color_type), expected)


def test_transform_errors():
    model = nepa_mm.load(save_classifier()[0], 'classifier.pth')
    save_image(Path('big.jpg'), (400, 300))
    content = Path('big.jpg').read_bytes()
    Path('cut.jpg').write_bytes(content[:len(content) // 2])
    for image, message in ((Image.open('cut.jpg'), 'cut.jpg cannot be read'),
                           ('cut.jpg', 'cut.jpg cannot be read'),
                           ('none.jpg', 'none.jpg cannot be read'),
                           (np.zeros((9, 9, 3)), 'path or a PIL image, got ndarray')):
        with pytest.raises(ValueError, match=message) as error:
            model.transform(image)
        assert '\n' not in str(error.value)
    assert 'Resize' in repr(model.transform)


def test_grey_network():
    config, _ = save_classifier()
    cfg = Config.fromfile(config)
    cfg.model.backbone.in_channels = 1
    cfg.model.data_preprocessor.update(mean=[100.], std=[50.])
    cfg.test_dataloader.dataset.pipeline[0] = dict(
        type='LoadImageWithPillow', color_type='grayscale')
    cfg.dump('grey.py')
    with pytest.warns(UserWarning, match='no weights'):
        model = nepa_mm.load('grey.py')
    assert model.transform('data/val/a/0.jpg').shape == (1, 28, 28)
    assert nepa_mm.features(model, 'data/val/a/0.jpg').shape == (1, 32)


def test_reader_of_the_runner(monkeypatch):
    """LoadImageFromFile of a config is the Runner's LoadImageWithPillow, for CMYK as well."""
    config, checkpoint = save_classifier()
    image = Image.open('data/val/a/0.jpg').convert('CMYK')
    image.save('data/val/a/0.jpg')
    _, inputs, dataset = runner_of(config, checkpoint, monkeypatch)
    use_one_reader(dataset, nepa_mm.load(config, checkpoint))
    model = nepa_mm.load(config, checkpoint)
    assert torch.equal(model.transform('data/val/a/0.jpg'), inputs[0])
