"""Masks and folders of segmentation data, drawn here, through the tools: right, or one sentence."""
import itertools
import re
from pathlib import Path

import numpy as np
import pytest
from mmengine.config import Config
from PIL import Image

from nepa_mm.utils.errors import DataError

from .tiny_runs import options, run_test, run_train, save_image, save_segmentor

LABEL = np.zeros((28, 32), dtype=np.uint8)
LABEL[:14, :16] = 1     # a quarter, as in tiny_runs
COUNT = itertools.count()
THREE = ['model.decode_head.num_classes=3'] + [
    f'{name}_dataloader.dataset.metainfo.{value}' for name in ('train', 'test')
    for value in ('classes=[background,corner,edge]', 'palette=[[0,0,0],[1,1,1],[2,2,2]]')]
BINARY = 'holds? the values 0 and 255, but the classes are 0..1, 255 is ignore_index.*class indices'


@pytest.fixture(autouse=True)
def segmentor(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    return save_segmentor()


def train(*values):
    return run_train(['segment.py', '--work-dir', 'work',
                      *options('model.decode_head.norm_cfg.type=BN', *values)])


def evaluate(*values):
    return run_test(['segment.py', 'segmentor.pth', '--work-dir', 'work', *options(
        'model.decode_head.norm_cfg.type=BN', *values)])


def refusal(tool, capsys, *values):
    """The one sentence in which a tool ends."""
    capsys.readouterr()
    with pytest.raises((SystemExit, DataError)) as error:
        tool(*values)
    said = capsys.readouterr().err if error.type is SystemExit else f'error: {error.value}\n'
    said = said[said.index('error: '):]
    assert said.count('\n') == 1 and not re.search(r'\. [A-Z]', said), said
    return said


def save_mask(pixels, name='1', suffix='png', mode=None):
    Path(f'data/labels/{name}.png').unlink(missing_ok=True)
    Image.fromarray(np.asarray(pixels), mode).save(f'data/labels/{name}.{suffix}')


def save_both(pixels, suffix='png'):
    for name in '01':
        save_mask(pixels, name, suffix)


def palette():
    image = Image.fromarray(LABEL).convert('P')
    image.putdata(LABEL.ravel())
    image.putpalette([0, 0, 0, 255, 0, 0, 9, 9, 9])
    for name in '01':
        image.save(f'data/labels/{name}.png')


def colours(channels):
    return np.stack([LABEL * 255] + [LABEL * 0] * (channels - 1), axis=-1)


def tear():
    path = Path('data/labels/1.png')
    save_mask(np.random.default_rng(0).integers(0, 2, (28, 32), dtype=np.uint8))
    path.write_bytes(path.read_bytes()[:80])


TIFF = [f'{name}_dataloader.dataset.seg_map_suffix=.tif' for name in ('train', 'test')]
FAULTS = dict(      # how the data are spoilt, what is said, options
    zero_and_255=(lambda: save_both(LABEL * 255), BINARY),
    times_256=(lambda: save_mask(LABEL.astype(np.uint16) * 256),
               r'labels/1\.png holds the values 0 and 256, but the classes are 0\.\.1'),
    times_257=(lambda: save_mask(LABEL.astype(np.uint16) * 257), 'labels/1.png.* 0 and 257'),
    beyond=(lambda: save_mask(LABEL * 7), r'labels/1\.png holds the values 0 and 7, .* 0\.\.1'),
    many=(lambda: save_mask(np.arange(896, dtype=np.uint16).reshape(28, 32)),
          r'1\.png holds 896 values, 0\.\.895, but'),
    rgb=(lambda: save_mask(colours(3)), r'labels/1\.png .* 3 channels.*\(0, 0, 0\).*\(255, 0, 0\)'),
    rgba=(lambda: save_mask(colours(4)), r'labels/1\.png .* 4 channels'),
    grey_alpha=(lambda: save_mask(colours(2), mode='LA'), r'labels/1\.png .* 2 channels'),
    size=(lambda: save_mask(LABEL.T), r'labels/1\.png has 32 x 28.*images/1\.jpg 28 x 32'),
    torn=(tear, r'mask data/labels/1\.png cannot be read'),
    no_image=(lambda: Path('data/labels/1.png').write_bytes(b'text'),
              r'mask data/labels/1\.png cannot be read'),
    no_mask=(lambda: Path('data/labels/1.png').unlink(),
             r'1 of 2 images .*no mask.*images/1\.jpg.*labels/1\.png'),
    fraction=(lambda: save_both(LABEL.astype(np.float32) / 2, 'tif'),
              r'labels/0\.tif holds the values 0 and 0\.5, but', *TIFF),
    negative=(lambda: save_both(-LABEL.astype(np.int32), 'tif'),
              r'labels/0\.tif holds the values -1 and 0, but', *TIFF),
    ignored=(lambda: save_both(LABEL * 0 + 255), r'every pixel.*2 checked masks.*ignored.*255'),
    reduced=(lambda: None, r'values 0 and 1, but the classes are 1\.\.2, 0 and 255 are ignored',
             'train_dataloader.dataset.reduce_zero_label=True',
             'test_dataloader.dataset.reduce_zero_label=True'),
    binary_of_three=(lambda: save_both(LABEL * 255),
                     r'values 0 and 255, but the classes are 0\.\.2', *THREE),
    some_zero_and_255=(lambda: save_mask(LABEL * 255),
                       r'1\.png holds the values 0 and 255, .* other masks hold 1 but never '),
    softmax_of_one=(lambda: None, 'single logit.* use_sigmoid=True',
                    'model.decode_head.num_classes=1'),
    too_many_names=(lambda: None,
                    r'3 classes.*background, corner, edge.*num_classes=2', *THREE[1:]),
    too_few_names=(lambda: None, r'2 classes.*background, corner.*num_classes=3', THREE[0]),
    suffix=(lambda: None, r"seg_map_suffix='_gt\.png'.*data/labels.*0\.png",
            'train_dataloader.dataset.seg_map_suffix=_gt.png',
            'test_dataloader.dataset.seg_map_suffix=_gt.png'),
    img_suffix=(lambda: None, r"img_suffix='\.webp'.*data/images.*0\.jpg",
                'train_dataloader.dataset.img_suffix=.webp',
                'test_dataloader.dataset.img_suffix=.webp'))


@pytest.mark.parametrize('tool', [train, evaluate])
@pytest.mark.parametrize('fault', FAULTS)
def test_fault_is_one_sentence_before_the_first_step(tool, fault, capsys):
    spoil, sentence, *values = FAULTS[fault]
    spoil()
    said = refusal(tool, capsys, *values)
    assert re.search(sentence, said), said
    assert not list(Path('work').rglob('*.pth'))


@pytest.mark.parametrize('save', [
    lambda: None, palette, lambda: save_both(LABEL.astype(bool)),
    lambda: save_both(LABEL.astype(np.uint16)), lambda: save_both(LABEL[..., None].squeeze(-1)),
], ids=['grey', 'palette', 'one_bit', 'sixteen_bits', 'as_drawn'])
def test_masks_of_class_indices_are_read_right(save):
    save()      # the checkpoint says class 1 everywhere: IoU 0 and 25
    assert evaluate() == dict(aAcc=25.0, mIoU=12.5, mAcc=50.0)
    assert train().iter == 1


def test_float_tiff_of_whole_numbers_is_read_right():
    save_both(LABEL.astype(np.float32), 'tif')
    assert evaluate(*TIFF)['mIoU'] == 12.5


def test_values_are_mapped_as_mmseg_does():
    """0 ignored and every value one less; the right quarter is class 1, all else class 0."""
    save_both(LABEL + 1)
    reduced = [f'{name}_dataloader.dataset.reduce_zero_label=True' for name in ('train', 'test')]
    assert evaluate(*reduced)['mIoU'] == 12.5
    assert train(*reduced).iter == 1


@pytest.mark.parametrize('workers', [0, 1])
def test_each_mask_is_looked_at_as_it_is_read(workers, capsys):
    """Of 130 masks the check before the run sees 100; the fault is in another."""
    for name in range(130):
        save_image(Path(f'data/images/{name:03d}.jpg'))
        save_mask(LABEL, f'{name:03d}')
    for name in '01':
        Path(f'data/images/{name}.jpg').unlink()
        Path(f'data/labels/{name}.png').unlink()
    looked_at = set(np.linspace(0, 129, 100).round().astype(int))
    name = f'{next(i for i in range(60, 130) if i not in looked_at):03d}'
    values = [f'{loader}_dataloader.{key}' for loader in ('train', 'test')
              for key in ('batch_size=65', f'num_workers={workers}')]
    for spoil, sentence in (
            (lambda: save_mask(LABEL * 9, name), rf'labels/{name}\.png holds the values 0 and 9'),
            (lambda: save_mask(LABEL * 255, name), rf'{name}\.png holds the values 0 and 255, '),
            (lambda: save_mask(LABEL.T, name), rf'labels/{name}\.png has 32 x 28'),
            (lambda: (save_mask(LABEL, name), tear_image(name)),
             rf'images/{name}\.jpg cannot be read')):
        spoil()
        for tool in (train, evaluate):
            with pytest.raises((SystemExit, DataError)) as error:
                tool(*values, f'experiment_name=masks{next(COUNT)}')   # a logger has one folder
            said = capsys.readouterr().err + str(error.value)
            assert re.search(sentence, said), said


def test_void_beside_both_classes_is_void():
    void = LABEL.copy()
    void[20:] = 255
    save_mask(void, '0')
    save_mask(np.where(void == 1, 0, void))
    assert train().iter == 1


def tear_image(name):
    path = Path(f'data/images/{name}.jpg')
    path.write_bytes(path.read_bytes()[:-200])


def log():
    return max(Path('work').rglob('*.log')).read_text()


def test_class_without_a_pixel_is_said_by_name():
    evaluate('model.decode_head.num_classes=2')
    assert 'ground truth' not in log()
    save_both(LABEL * 0)
    train()
    assert re.search(r"'corner'.*none of the 2 checked masks", log())
    evaluate()
    assert re.search(r"ground truth has no pixel of 'corner'.*IoU is nan.*mIoU", log())


def test_evaluation_without_ground_truth_is_no_nan(capsys):
    """The masks are right; a later step of the pipeline covers them."""
    cfg = Config.fromfile('segment.py')
    for name in '01':
        save_image(Path(f'data/images/{name}.jpg'), size=(28, 28))
        save_mask(LABEL[:, :28], name)
    cfg.test_dataloader.dataset.pipeline.insert(3, dict(
        type='RandomCutOut', prob=1., n_holes=20000, cutout_shape=(32, 32), seg_fill_in=255))
    cfg.dump('segment.py')
    assert 'ground truth has no pixel of any class' in refusal(evaluate, capsys)


def test_rotated_photo_and_its_mask():
    """EXIF turns the photo upright when it is read; a mask has to fit it as it is seen."""
    for name in '01':
        image = Image.open(f'data/images/{name}.jpg')
        exif = Image.Exif()
        exif[0x0112] = 6
        image.resize((28, 32)).save(f'data/images/{name}.jpg', exif=exif)
    assert evaluate()['mIoU'] == 12.5


def test_images_of_another_suffix_are_counted():
    for name in '234':
        save_image(Path(f'data/images/{name}.png'))
        save_mask(LABEL, name)
    train()
    assert re.search(r"3 of 5 images in data/images .*img_suffix='\.jpg'.*2\.png", log())
    assert 'have no image' not in log()


def test_masks_without_an_image_are_counted():
    save_mask(LABEL, '7')
    save_mask(LABEL, '8')
    evaluate()
    assert re.search(r'2 of 4 masks in data/labels .*have no image.*7\.png', log())


def test_images_and_masks_in_one_folder_are_no_strangers():
    for name in '01':
        Path(f'data/labels/{name}.png').rename(f'data/images/{name}.png')
    evaluate('test_dataloader.dataset.data_prefix.seg_map_path=images')
    assert 'suffix' not in log().split('mIoU')[0].split('Checkpoint')[-1]


def test_a_list_of_names_leaves_out_what_it_wants():
    Path('data/list.txt').write_text('1\n')
    for name in '89':
        save_image(Path(f'data/images/{name}.png'))
        save_mask(LABEL, name)
    evaluate('test_dataloader.dataset.ann_file=list.txt')
    assert 'are skipped' not in log()


def test_wrapped_data_sets_are_looked_at(capsys):
    cfg = Config.fromfile('segment.py')
    part = cfg.train_dataloader.dataset
    cfg.train_dataloader.dataset = dict(type='RepeatDataset', times=2, dataset=dict(
        type='ConcatDataset', datasets=[part, dict(part, indices=1)]))
    cfg.dump('segment.py')
    assert train().iter == 3
    save_mask(LABEL * 5)
    assert '1.png holds the values 0 and 5' in refusal(train, capsys)


def test_two_heads_of_different_classes(capsys):
    said = refusal(train, capsys, *THREE, 'model.auxiliary_head.type=FCNHead',
                   'model.auxiliary_head.in_channels=32', 'model.auxiliary_head.channels=8',
                   'model.auxiliary_head.in_index=0', 'model.auxiliary_head.num_classes=2')
    assert 'auxiliary_head' in said and 'num_classes=2' in said and '3' in said


def test_what_reads_masks_is_in_the_log_and_the_config_stays():
    """mmseg's inference looks for its own names in the saved config."""
    train()
    saved = Config.fromfile('work/segment.py')
    assert saved.train_dataloader.dataset.pipeline[1].type == 'LoadAnnotations'
    assert 'Replaced: LoadAnnotations by LoadCheckedMask.' in log()
