"""The digits: split, balance, order, refusals."""
import numpy as np
import pytest
from mmengine.registry import DATASETS
from PIL import Image

from make_digit_scenes import write_digit_scenes
from nepa_mm.datasets.digits import Digits


def test_split_covers_scikit_learn():
    from sklearn.datasets import load_digits
    train, test = Digits(split='train'), Digits(split='test')
    assert (len(train), len(test)) == (1297, 500)
    images = np.stack([dataset[i]['img'][..., 0] for dataset in (train, test)
                       for i in range(len(dataset))])
    original = (load_digits().images * 255 / 16).round().astype(np.uint8)
    assert (np.sort(images.reshape(-1, 64), axis=0) == np.sort(original.reshape(-1, 64), 0)).all()
    assert len({image.tobytes() for image in images[:1297]} &
               {image.tobytes() for image in images[1297:]}) == 0


def test_few_labels_are_balanced_and_seeded():
    def labels_and_images(seed):
        dataset = DATASETS.build(dict(type='Digits', split='train', num_labels=100, seed=seed))
        samples = [dataset[i] for i in range(len(dataset))]
        return (np.bincount([s['gt_label'] for s in samples]).tolist(),
                [s['img'].tobytes() for s in samples])

    assert labels_and_images(0)[0] == [10] * 10
    assert labels_and_images(0) == labels_and_images(0) != labels_and_images(1)


def test_label_fits_image():
    from sklearn.datasets import load_digits
    digits, known = load_digits(), {}
    for image, label in zip(digits.images, digits.target):
        known[(image * 255 / 16).round().astype(np.uint8).tobytes()] = label
    for sample in Digits(split='test', num_labels=50):
        assert known[np.ascontiguousarray(sample['img'][..., 0]).tobytes()] == sample['gt_label']


@pytest.mark.parametrize('kwargs, message', [
    (dict(split='val'), r"split must be one of \('train', 'test'\), got 'val'"),
    (dict(split='train', num_labels=15), 'num_labels must be a multiple of 10 up to .*, got 15'),
    (dict(split='test', num_labels=5000), 'got 5000')])
def test_refusals(kwargs, message):
    with pytest.raises(ValueError, match=message):
        Digits(**kwargs)


def test_digit_scenes(tmp_path):
    """ADE20K's layout; labels lie where the ink is; a scene depends on its number alone."""
    write_digit_scenes(tmp_path / 'a', 3, 2)
    write_digit_scenes(tmp_path / 'b', 2, 2)
    write_digit_scenes(tmp_path / 'c', 1, 1, seed=1)
    for part, num in (('training', 3), ('validation', 2)):
        images = sorted((tmp_path / 'a' / 'images' / part).iterdir())
        assert [path.name for path in images] == [f'{i:05d}.jpg' for i in range(num)]
        for path in images:
            image = np.asarray(Image.open(path).convert('L')).astype(int)
            annotation = tmp_path / 'a' / 'annotations' / part / f'{path.stem}.png'
            label = np.asarray(Image.open(annotation))
            assert image.shape == label.shape == (32, 32) and label.max() <= 11
            for corner in np.s_[:16, :16], np.s_[:16, 16:], np.s_[16:, :16], np.s_[16:, 16:]:
                assert len(set(np.unique(label[corner])) - {0, 1}) == 1     # one digit each
            assert image[label > 1].min() > 60 > image[label == 1].mean()
    read = lambda folder: (tmp_path / folder / 'images/training/00000.jpg').read_bytes()  # noqa: E731
    assert read('a') == read('b') != read('c')
