"""The page of tools/analysis_tools/visualize.py --html, opened in a browser."""
import json
import re
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from mmengine.config import Config
from mmengine.registry import MODELS

from nepa_mm.models.vit import NEPAViT
from nepa_mm.visualization import html_page
from nepa_mm.visualization.image_maps import inspect_image

from .conftest import smooth_images
from .tiny_runs import load_tool, save_classifier, save_image, save_pretraining, save_segmentor

tool = load_tool('visualize')
ODD_NAME = 'x</script><b>ä &amp;.png'     # with its folder
CLASS_TOKEN, PATCH = -1, 14


@pytest.fixture(scope='module')
def browser():
    """Debian's headless chromium at 1280 x 800 pixels."""
    webdriver = pytest.importorskip('selenium.webdriver')
    programs = [shutil.which(name) for name in ('chromium', 'chromedriver')]
    if not all(programs):
        pytest.skip('needs the programs chromium and chromedriver')
    options = webdriver.ChromeOptions()
    options.binary_location = programs[0]
    for flag in ('headless=new', 'no-sandbox', 'disable-dev-shm-usage', 'window-size=1280,800'):
        options.add_argument(f'--{flag}')
    options.set_capability('goog:loggingPrefs', dict(browser='ALL', performance='ALL'))
    driver = webdriver.Chrome(options=options, service=webdriver.ChromeService(programs[1]))
    driver.set_script_timeout(20)
    yield driver
    driver.quit()


class Page:
    """What a reader of the page does and sees."""

    def __init__(self, browser, path):
        from selenium.webdriver import ActionChains, Keys
        from selenium.webdriver.support.ui import Select, WebDriverWait
        self.browser, self.actions, self.keys, self.select = browser, ActionChains, Keys, Select
        self.wait = WebDriverWait(browser, 20)
        for kind in ('browser', 'performance'):
            browser.get_log(kind)       # of earlier pages
        browser.get(Path(path).resolve().as_uri())
        self.wait.until(lambda _: self.text('look-text'))

    def text(self, name):
        return self.browser.find_element('id', name).text

    def number(self, name):
        """The last number of a line."""
        found = re.findall(r'[+−-]?\d+\.?\d*', self.text(name))
        return float(found[-1].replace('−', '-')) if found else None

    def choose(self, **options):
        for name, option in options.items():
            self.select(self.browser.find_element('id', name)).select_by_visible_text(option)

    def at(self, patch, grid, area='stage'):
        """Move the pointer to a patch, or to the class token."""
        if patch == CLASS_TOKEN:
            cell, = self.browser.find_elements('css selector', '#picture .prefix span')
            return self.actions(self.browser, 0).move_to_element(cell)
        stage = self.browser.find_element('id', area)
        row, column = divmod(patch, grid[1])
        offset = [round(((i + 0.5) / n - 0.5) * size) for i, n, size in (
            (column, grid[1], stage.size['width']), (row, grid[0], stage.size['height']))]
        return self.actions(self.browser, 0).move_to_element_with_offset(stage, *offset)

    def hover(self, patch, grid, **area):
        self.at(patch, grid, **area).perform()

    def click(self, patch, grid, **area):
        self.at(patch, grid, **area).click().perform()

    def press(self, *keys):
        self.actions(self.browser, 0).send_keys(*keys).perform()

    def complaints(self):
        """Errors and warnings of the console, and requests beyond the file itself."""
        said = [line['message'] for line in self.browser.get_log('browser')]
        messages = [json.loads(line['message'])['message']
                    for line in self.browser.get_log('performance')]
        urls = [one['params']['request']['url'] for one in messages
                if one['method'] == 'Network.requestWillBeSent']
        assert any(url.startswith('file://') for url in urls)
        return said + [url for url in urls if not url.startswith(('file://', 'data:image/png'))]


def enlarge(model):
    """Larger weights than at the start, so that heads, blocks and patches differ."""
    torch.manual_seed(0)
    for name, parameter in model.named_parameters():
        parameter.data += (0.5 if 'qkv' in name else 0.1) * torch.randn_like(parameter)


def save_weights(config, path, **backbone):
    cfg = Config.fromfile(config)
    cfg.model.backbone.update(backbone)
    cfg.dump(config)
    model = MODELS.build(cfg.model).eval()
    enlarge(model)
    torch.save(dict(state_dict=model.state_dict()), path)
    return cfg, model.backbone


def network_input(path, cfg, size=4 * PATCH):
    return tool.normalise(tool.load_image(path, cfg, size, (PATCH, PATCH)), cfg, 'cpu')


@pytest.fixture
def pretrained(folder):
    """A page of images of 4 x 6, 6 x 4 and 6 x 4 patches; its config and backbone."""
    config = save_pretraining()
    cfg, backbone = save_weights(config, 'pretrained.pth')
    save_image(Path('photo.jpg'), (90, 60))
    odd_names = ODD_NAME, ODD_NAME.replace('x', 'y')        # so that the page names folders
    for name in odd_names:
        save_image(Path(name), (60, 90))
    tool.main([config, 'pretrained.pth', 'photo.jpg', *odd_names, '--size', '56',
               '--html', 'a.html'])
    return cfg, backbone


def stored_step(view):
    """What a page may deviate: a part of the largest weight, and the rounding to 0.01 %."""
    largest = max(np.nanmax(view.attention), view.prefix_attention)
    return float(largest) / html_page.LEVELS + 5.1e-5


def check_attention(page, view, area, at):
    """The shown weight of a cell lies within the stored precision of Python's."""
    step = stored_step(view)
    page.hover(at, view.attention.shape, area=area)
    weight = view.attention.ravel()[at]
    if np.isnan(weight):
        assert 'not yet read' in page.text('look-here')
    else:
        assert page.number('look-here') / 100 == pytest.approx(weight, abs=step)


def test_numbers_are_those_of_python(pretrained, browser):
    """Click a patch, then read other patches; blocks, heads, mean and rollout."""
    cfg, backbone = pretrained
    page, grid = Page(browser, 'a.html'), (4, 6)
    assert page.text('name') == 'photo.jpg'
    assert page.text('source') == 'pretrained.pth (raw weights)'
    img, query = network_input('photo.jpg', cfg), 15
    page.click(query, grid)
    assert 'row 2, column 3' in page.text('where') and 'pinned' in page.text('where')
    shown = []
    for block, head in ((0, 0), (0, 1), (2, 0), (1, 'mean of heads'), (2, 'rollout')):
        page.choose(block=str(block), head=f'head {head}' if head in (0, 1) else head)
        layers = range(block + 1) if head == 'rollout' else [block]
        view = inspect_image(backbone, img, query, layers, [head] if head in (0, 1) else [0, 1], 0,
                             head == 'rollout', 1)
        shown.append(view.attention)
        for patch in (0, 7, 15, 16):
            check_attention(page, view, 'look-map', patch)
        page.hover(CLASS_TOKEN, grid)
        assert page.number('look-here') / 100 == pytest.approx(
            view.prefix_attention, abs=stored_step(view))
    differences = [np.nanmax(abs(a - b)) for a, b in zip(shown, shown[1:])]
    assert min(differences) > 3 * np.nanmax(shown) / html_page.LEVELS

    rank = 1 + (view.similarity > view.similarity.flat[16]).sum()
    assert f'ranks {rank} of 24' in page.text('next-text')
    assert page.number('sure-text') == pytest.approx(view.next_cosine.flat[16], abs=6e-4)
    assert page.number('lift-text') == pytest.approx(view.lift.flat[16], abs=6e-4)
    for patch in (0, 9, 16, 23):
        page.hover(patch, grid)
        for name, values in (('next', view.similarity), ('sure', view.next_cosine),
                             ('lift', view.lift)):
            if not np.isnan(values.flat[patch]):
                assert page.number(f'{name}-here') == pytest.approx(values.flat[patch], abs=6e-4)
    page.hover(0, grid)
    assert 'no value' in page.text('lift-here')     # the class token had no patch to copy
    assert not page.complaints()


def test_hover_class_token_and_last_patch(pretrained, browser):
    """Without a pin the maps follow the pointer, over every map."""
    cfg, backbone = pretrained
    page, grid = Page(browser, 'a.html'), (4, 6)
    view = inspect_image(backbone, network_input('photo.jpg', cfg), 5, [2], [0, 1], 0, shift=1)
    for area in ('stage', 'look-map', 'next-map', 'sure-map', 'lift-map'):
        page.hover(0, grid, area=area)
        page.hover(5, grid, area=area)
        assert 'row 0, column 5' in page.text('where') and 'pinned' not in page.text('where')
        assert page.number('sure-text') == pytest.approx(view.next_cosine.flat[6], abs=6e-4)
    page.hover(23, grid)
    assert 'No patch follows' in page.text('next-text') and 'No ' in page.text('sure-text')
    page.hover(CLASS_TOKEN, grid)
    assert 'class token' in page.text('where') and '100.00 %' in page.text('look-text')
    assert page.number('sure-text') == pytest.approx(view.next_cosine.flat[0], abs=6e-4)
    assert 'No patch that it could copy' in page.text('lift-text')
    assert not page.complaints()


def test_second_image_and_its_odd_name(pretrained, browser):
    cfg, backbone = pretrained
    page = Page(browser, 'a.html')
    browser.find_elements('css selector', '#thumbs button')[1].click()
    page.wait.until(lambda _: page.text('name') == ODD_NAME)
    view = inspect_image(backbone, network_input(ODD_NAME, cfg), 9, [2], [0, 1], 0, shift=1)
    page.click(9, (6, 4))
    assert 'row 2, column 1' in page.text('where')
    assert page.number('sure-text') == pytest.approx(view.next_cosine.flat[10], abs=6e-4)
    check_attention(page, view, 'look-map', 3)
    assert not page.complaints()


def test_keys(pretrained, browser):
    page = Page(browser, 'a.html')

    def chosen(name):
        return page.select(browser.find_element('id', name)).first_selected_option.text

    page.press(*[page.keys.TAB] * 4)        # three thumbnails, then the picture
    assert browser.switch_to.active_element.get_attribute('id') == 'stage'
    assert 'row 2, column 3' in page.text('where')              # the middle
    page.press(page.keys.ARROW_UP, page.keys.ARROW_LEFT, page.keys.ENTER)
    assert 'row 1, column 2' in page.text('where') and 'pinned' in page.text('where')
    page.press(page.keys.ARROW_LEFT, page.keys.ARROW_LEFT, page.keys.ARROW_LEFT)
    assert 'row 1, column 2' in page.text('where') and 'row 1, column 0' in page.text('look-here')
    page.press(page.keys.ESCAPE)
    assert 'row 1, column 0' in page.text('where') and 'pinned' not in page.text('where')
    page.press(page.keys.ARROW_UP, page.keys.ARROW_UP)
    assert 'class token' in page.text('where')
    page.press(page.keys.ARROW_DOWN, ' ')
    assert 'row 0, column 0' in page.text('where') and 'pinned' in page.text('where')
    assert (chosen('block'), chosen('head')) == ('2', 'mean of heads')
    page.press('b', 'h')
    assert (chosen('block'), chosen('head')) == ('0', 'rollout')
    page.press('B', 'h')
    assert (chosen('block'), chosen('head')) == ('2', 'head 0')
    page.press(page.keys.TAB)
    assert browser.switch_to.active_element.get_attribute('id') == 'block'
    page.press(page.keys.ARROW_UP)      # the menu's own
    assert chosen('block') == '1' and 'row 0, column 0' in page.text('where')
    assert not page.complaints()


@pytest.mark.parametrize('width', [390, 1280])
def test_nothing_is_cut_off(pretrained, browser, width):
    browser.execute_cdp_cmd('Emulation.setDeviceMetricsOverride', dict(
        width=width, height=800, deviceScaleFactor=1, mobile=width < 500))
    try:
        page = Page(browser, 'a.html')
        assert browser.execute_script('return document.documentElement.scrollWidth') <= width
        boxes = [element.rect for element in browser.find_elements('tag name', 'article')]
        assert len(boxes) == 5 and all(box['width'] > 300 for box in boxes)
        bottom = max(box['y'] + box['height'] for box in boxes)
        assert width < 500 or bottom <= 800     # all maps at one glance
        assert not page.complaints()
    finally:
        browser.execute_cdp_cmd('Emulation.clearDeviceMetricsOverride', {})


@pytest.mark.parametrize('save, scope', [(save_classifier, None), (save_segmentor, 'mmseg')])
def test_networks_that_do_not_predict(save, scope, folder, browser):
    """The segmentor attends to all patches and has registers; one block and one head are chosen."""
    if scope:
        pytest.importorskip(scope)
    config, _ = save()
    cfg, backbone = save_weights(config, 'w.pth', num_register_tokens=2 if scope else 0)
    image = str(next(Path('data').rglob('0.jpg')))
    tool.main([config, 'w.pth', image, '--size', '56', '--html', 'out/a.html', '--query', '1', '2',
               '--layers', '1', '-1', '--heads', '1'])
    page = Page(browser, 'out/a.html')
    assert 'row 1, column 2' in page.text('where')
    assert len(browser.find_elements('css selector', '.stage')) == 2
    assert f'{cfg.model.type} was not trained to predict' in page.text('words')
    page.choose(block='1', head='head 1')
    img = network_input(image, cfg)
    grid = tuple(side // PATCH for side in img.shape[2:])
    page.click(6, grid)
    view = inspect_image(backbone, img, 6, [1], [1], 0)
    assert view.attention.shape == grid and np.isnan(view.attention).any() == (not scope)
    for patch in (0, 6, 9):
        check_attention(page, view, 'look-map', patch)
    cells = browser.find_elements('css selector', '#picture .prefix span')
    names = [cell.get_attribute('title') for cell in cells]
    assert names == ['class token', 'register 0', 'register 1'][:backbone.num_extra_tokens]
    assert not page.complaints()


def test_network_that_reads_all_patches_at_once(folder, browser):
    config = save_pretraining()
    save_weights(config, 'w.pth', causal=False)
    save_image(Path('photo.jpg'))
    tool.main([config, 'w.pth', 'photo.jpg', '--html', 'a.html'])
    page = Page(browser, 'a.html')
    assert 'has seen the patch that it would have to predict' in page.text('words')
    assert not browser.find_elements('id', 'next-map') and not page.complaints()


def test_grey_and_many_channels(folder, browser):
    for channels in (1, 5):
        config = save_pretraining()
        cfg = Config.fromfile(config)
        cfg.model.data_preprocessor.update(mean=[127.5] * channels, std=[127.5] * channels)
        cfg.train_dataloader.dataset.pipeline[0].update(
            color_type='grayscale' if channels == 1 else 'unchanged')
        cfg.dump(config)
        cfg, backbone = save_weights(config, 'w.pth', in_channels=channels)
        pixels = np.random.default_rng(0).integers(0, 256, (60, 90, channels), dtype=np.uint8)
        name = f'{channels}.npy'
        np.save(name, pixels)
        tool.main([config, 'w.pth', name, '--size', '28', '--html', f'{channels}.html'])
        page = Page(browser, f'{channels}.html')
        page.click(1, (2, 3))
        view = inspect_image(backbone, network_input(name, cfg, 28), 1, [2], [0, 1], 0, shift=1)
        assert page.number('sure-text') == pytest.approx(view.next_cosine.flat[2], abs=6e-4)
        assert not page.complaints()


def test_size_of_a_page(tmp_path):
    """Attention that varies as much as noise compresses worst."""
    backbone = NEPAViT('base', img_size=224, patch_size=14).eval()
    for layer in backbone.layers:
        layer.attn.qkv.weight.data *= 3
    img = smooth_images(1) + 0.3 * torch.randn(1, 3, 224, 224)
    pixels = np.random.default_rng(0).integers(0, 256, (224, 224, 3), dtype=np.uint8)
    layers, heads = range(12), range(12)
    entry = html_page.describe_image(backbone, img, 'noise', pixels, layers, heads, 1)
    html_page.write_page(tmp_path / 'a.html', [entry], backbone, layers, heads, 'x.pth', shift=1)
    assert entry['grid'] == (16, 16)
    assert 2e6 < (tmp_path / 'a.html').stat().st_size < 5e6


def test_stored_weights():
    """Of any sharpness, within the stated part of the largest one in a row."""
    torch.manual_seed(0)
    weights = (torch.randn(4, 50, 50) * torch.tensor([0.01, 1, 5, 50])[:, None, None]).softmax(-1)
    largest, codes = html_page.quantise(weights)
    stored = 2 ** (largest[..., None] / -4096) * (codes / html_page.LEVELS) ** 2
    errors = abs(stored - weights.numpy()) / weights.amax(-1, keepdim=True).numpy()
    assert errors.max() < 1 / html_page.LEVELS


def test_existing_pages_and_refusals(pretrained, capsys):
    arguments = ['pretrain.py', 'pretrained.pth', 'photo.jpg', '--html', 'a.html']
    before = Path('a.html').read_bytes()
    capsys.readouterr()
    tool.main(arguments)
    assert capsys.readouterr().out.split()[-1] == 'a_2.html'
    assert Path('a.html').read_bytes() == before and not Path('visualization').exists()

    def refuse(*args):
        with pytest.raises(SystemExit) as error:
            tool.main([*arguments[:-1], 'new/b.html', *args])
        assert error.value.code == 2 and not Path('new').exists()
        return capsys.readouterr().err.strip().split('\n')[-1]

    for flag in (['--grid'], ['--out-dir', 'x'], ['--seed', '0'], ['--block', '0'], ['--rollout']):
        assert f'{flag[0]} belongs to figures' in refuse(*flag)
    assert "ends in .html, got 'new'" in refuse('--html', 'new')
    assert 'rows 0 to 1' in refuse('--query', '2', '0')
    assert re.search(r'would hold \d+ million .* --size', refuse('--size', '1008'))
