"""Figures of what a network does with an image."""
import textwrap
from collections.abc import Sequence
from math import log
from pathlib import Path
from typing import Any

import matplotlib.pyplot as plt
import numpy as np
from matplotlib.axes import Axes
from matplotlib.colors import Normalize, PowerNorm
from matplotlib.figure import Figure
from matplotlib.image import AxesImage
from matplotlib.patches import Patch, Rectangle

from nepa_mm.utils.files import atomic_write
from nepa_mm.visualization.image_maps import View

QUERY, TARGET, NO_VALUE, DASHES = '#ff2d2d', '#00b7ff', '#d4d4d8', (0, (2, 1))
# map: (name on a sheet, colour map, mark the target); the last three need a prediction
PANELS = dict(
    image=('image', None, True), attention=('attention', 'inferno', False),
    pca=('PCA', None, False), similarity=('prediction', 'viridis', True),
    next_cosine=('next-cosine', 'viridis', False), lift=('lift', 'RdBu_r', False))


def panel_names(view: View) -> list[str]:
    """Names of the panels for which a view has maps."""
    return list(PANELS)[:3 if view.next_cosine is None else 6]


def panel_titles(image: np.ndarray, view: View, settings: dict[str, str]) -> dict[str, str]:
    """Titles of the panels; ``settings`` as in :func:`draw_page`."""
    (height, width), (gh, gw) = image.shape[:2], view.attention.shape
    titles = dict(
        image=f'what the model saw: {width} x {height} pixels, {gw} x {gh} patches',
        attention=f'attention of the query, {settings["attention"]}; class token '
                  f'{view.prefix_attention:.0%}',
        pca=f'features, {settings["pca"]}: three principal components '
            f'({view.pca_variance:.0%} of the variance) as colours')
    if view.next_cosine is not None:
        titles['similarity'] = 'cosine of the output at the query with every patch embedding'
        if view.target is not None:
            rank = 1 + (view.similarity > view.similarity.flat[view.target]).sum()
            titles['similarity'] += f'; its target ranks {rank} of {gh * gw}'
        titles['next_cosine'] = ('next-cosine of each patch: with the output that predicts it; '
                                 f'mean {np.nanmean(view.next_cosine):.3f}')
        titles['lift'] = ('lift of each patch: next-cosine minus copy-cosine; '
                          f'mean {np.nanmean(view.lift):+.3f}')
    return titles


def normalisation(name: str, views: Sequence[View]) -> Normalize | None:
    """Shared colour scale of one map of all views; None without values or a colour map."""
    maps = [getattr(view, name) for view in views] if PANELS[name][1] else []
    maps = [values.ravel() for values in maps if values is not None]
    if not maps:
        return None
    values = np.concatenate(maps)
    low, high = np.nanmin(values), np.nanmax(values)
    if name == 'attention':     # spread small weights, as the reference does
        return PowerNorm(0.25, 0, high)
    if name == 'lift':          # white is zero
        low, high = -max(-low, high), max(-low, high)
    return Normalize(low, high)


def draw_map(axis: Axes, name: str, image: np.ndarray, view: View, norm: Normalize | None,
             lw: float) -> AxesImage:
    """Draw one panel in pixel coordinates of the image; mark query and target."""
    (height, width), (gh, gw) = image.shape[:2], view.attention.shape
    _, cmap, mark_target = PANELS[name]
    values = image if name == 'image' else getattr(view, name)
    if values is None:
        axis.text(0.5, 0.5, 'predicts nothing', ha='center', va='center',
                  transform=axis.transAxes)
        values = np.full((gh, gw), np.nan)
    shown = axis.imshow(
        values, cmap=cmap and plt.get_cmap(cmap).with_extremes(bad=NO_VALUE), norm=norm,
        extent=(0, width, height, 0), interpolation='auto' if name == 'image' else 'nearest')
    axis.set(xticks=[], yticks=[])
    marks = [(view.query, QUERY, '-')]
    if mark_target and view.target is not None:
        marks.insert(0, (view.target, TARGET, DASHES))
    edges = [(patch, 'black', '-', 2 * lw) for patch, _, _ in marks]
    for patch, colour, style, width_pt in edges + [(*mark, lw) for mark in marks]:
        corner = (patch % gw * width / gw, patch // gw * height / gh)
        axis.add_patch(Rectangle(corner, width / gw, height / gh, fill=False, ec=colour,
                                 ls=style, lw=width_pt, clip_on=False))
    return shown


def colour_bar(figure: Figure, shown: AxesImage, cax: Axes, **kwargs: Any) -> None:
    """Draw the colour bar of a map."""
    if isinstance(shown.norm, PowerNorm):   # ticks where colours are evenly spaced
        kwargs.update(ticks=shown.norm.inverse(np.linspace(0, 1, 5)), format='%.2g')
    figure.colorbar(shown, cax=cax, **kwargs).ax.tick_params(labelsize=8)


def add_legend(figure: Figure, view: View, causal: bool) -> None:
    """Explain below the panels the marks, and which output predicts which patch."""
    predicts = view.next_cosine is not None
    handles = [Patch(fill=False, ec=QUERY, lw=1.6, label='query')]
    note = 'No prediction: this network was not trained to predict embeddings.'
    if predicts:
        handles.append(Patch(fill=False, ec=TARGET, lw=1.6, ls=DASHES,
                             label='target: the patch that the output at the query predicts'))
        note = ('Patches are read row by row. Next-cosine and lift are drawn at the patch that is '
                'predicted, not at the one whose output predicts it. The class token makes the '
                'first prediction and has no patch to copy; the output at the last patch predicts '
                'nothing, and pretraining leaves that input out.')
    if causal or predicts:
        handles.append(Patch(color=NO_VALUE, label='no value' + ', or not yet read' * causal))
    legend = figure.legend(
        handles=handles, loc='outside lower center', ncols=3, fontsize=9, frameon=False,
        title=textwrap.fill(note, int(figure.get_figwidth() * 12)), title_fontsize=9)
    legend.get_title().set_multialignment('center')


def shorten(name: str, length: int) -> str:
    """Replace the middle of a name longer than ``length`` by dots."""
    return name if len(name) <= length else f'{name[:length // 2 - 1]}...{name[-length // 2 + 2:]}'


def draw_page(path: Path, name: str, image: np.ndarray, view: View, source: str,
              settings: dict[str, str], causal: bool) -> None:
    """Draw the figure of one image.

    Args:
        path (Path): The output file; must not exist.
        name (str): Name of the image.
        image (ndarray): Pixels that the network saw, (height, width, 3), uint8.
        view (View): Maps of the image.
        source (str): Checkpoint and weights, for the title.
        settings (dict[str, str]): 'attention' and 'pca': layers, heads and block in words.
        causal (bool): Whether the query cannot attend to later patches.
    """
    names, aspect = panel_names(view), image.shape[0] / image.shape[1]
    w, h = 4.2 * aspect ** -0.5, 4.2 * aspect ** 0.5
    rows = min((r for r in (1, 2, 3, 6) if len(names) % r == 0),
               key=lambda r: abs(log(len(names) / r * w / (r * h) / 1.8)))
    columns = len(names) // rows
    figure, axes = plt.subplots(rows, columns, squeeze=False, layout='constrained',
                                figsize=(max(columns * (w + 0.9), 7), rows * (h + 0.6) + 1.2))
    titles = panel_titles(image, view, settings)
    for axis, panel in zip(axes.flat, names):
        norm = normalisation(panel, [view])
        shown = draw_map(axis, panel, image, view, norm, lw=1.6)
        axis.set_title(textwrap.fill(titles[panel], int(max(w, 2.4) * 13)), fontsize=9)
        if norm:
            colour_bar(figure, shown, axis.inset_axes((1.03, 0, 0.04 * max(1, aspect), 1)))
    length = int(figure.get_figwidth() * 9)
    figure.suptitle(f'{shorten(name, length)}\n{shorten(source, length)}', parse_math=False)
    add_legend(figure, view, causal)
    save(figure, path)


def draw_sheet(path: Path, entries: Sequence[tuple[str, np.ndarray, View]], source: str,
               settings: dict[str, str], causal: bool) -> None:
    """Draw a contact sheet: one row per image, one column and colour scale per map.

    ``entries`` has (name, image, view) of each image; other arguments as in :func:`draw_page`.
    """
    views = [view for _, _, view in entries]
    names = panel_names(views[0])
    heights = [min(max(image.shape[0] / image.shape[1], 0.4), 1.6) for _, image, _ in entries]
    figure, axes = plt.subplots(
        len(entries) + 1, len(names), layout='constrained', height_ratios=[*heights, 0.06],
        figsize=(2.1 * len(names) + 0.4, 2.1 * sum(heights) + 0.1 * len(entries) + 2.1))
    for column, panel in zip(axes.T, names):
        norm = normalisation(panel, views)
        for axis, (_, image, view) in zip(column, entries):
            shown = draw_map(axis, panel, image, view, norm, lw=1.2)
        column[0].set_title(PANELS[panel][0], fontsize=11)
        if norm:
            colour_bar(figure, shown, column[-1], orientation='horizontal')
        column[-1].set_visible(norm is not None)
    for axis, (name, _, _), height in zip(axes[:, 0], entries, heights):
        axis.set_ylabel(textwrap.fill(shorten(name, 60), int(height * 25)), fontsize=8,
                        parse_math=False)
    figure.suptitle(f'{shorten(source, 110)}\nattention: {settings["attention"]}; '
                    f'PCA: {settings["pca"]}', parse_math=False, fontsize=11)
    add_legend(figure, views[0], causal)
    save(figure, path)


def save(figure: Figure, path: Path) -> None:
    """Write a figure atomically and close it."""
    with atomic_write(path) as temporary:
        figure.savefig(temporary, dpi=120)
    plt.close(figure)
