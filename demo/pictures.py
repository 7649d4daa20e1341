"""Pictures that demos share."""
import contextlib
import io

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image

from nepa_mm.compat.quiet import import_mmseg


@torch.no_grad()
def plot_predictions(model, bank, images, name, path):
    """Plot images, the model's prediction of each patch, and its cosine with the patch.

    A predicted embedding is shown as the training patch with the nearest embedding.

    Args:
        model (NEPA): The pretrained model, in evaluation mode.
        bank (Tensor): Normalised training images (M, C, H, W).
        images (Tensor): Normalised images (n, C, H, W); their first channel is shown.
        name (str): What they show, for the title.
        path (Path): The image file.
    """
    import matplotlib.pyplot as plt

    backbone, (size, _) = model.backbone, model.backbone.patch_embed.patch_size
    z, (gh, gw) = backbone.embed(images)
    h = model.forward_tokens(z, (gh, gw))[-1]
    patches = F.unfold(bank[:, :1], size, stride=size).transpose(1, 2).flatten(0, 1)
    keys = F.normalize(backbone.embed(bank)[0].flatten(0, 1), dim=-1)
    nearest = (F.normalize(h, dim=-1) @ keys.T).argmax(dim=-1)              # n N
    expected = F.fold(patches[nearest].transpose(1, 2), images.shape[2:], size, stride=size)
    cosine = F.cosine_similarity(h, z, dim=-1).unflatten(1, (gh, gw))

    rows = [('image', images[:, 0], dict(cmap='gray', vmin=-1, vmax=1)),
            ('predicted:\neach patch from\nthose before it', expected[:, 0],
             dict(cmap='gray', vmin=-1, vmax=1)),
            ('cosine of\nprediction\nand patch', cosine, dict(cmap='viridis', vmin=0, vmax=1))]
    figure, axes = plt.subplots(3, len(images), figsize=(1.25 * len(images) + 2, 4.6),
                                layout='constrained')
    for line, (label, panels, style) in zip(axes, rows):
        for axis, panel in zip(line, panels):
            shown = axis.imshow(panel, extent=(0, gw, gh, 0), interpolation='nearest', **style)
            axis.set(xticks=range(gw + 1), yticks=range(gh + 1), xticklabels=[], yticklabels=[])
            axis.tick_params(length=0)
            axis.grid(color='#64748b', linewidth=0.4)
        line[0].set_ylabel(label, rotation=0, ha='right', va='center')
    figure.colorbar(shown, ax=axes[2], fraction=0.05, pad=0.01)
    figure.suptitle(f'What NEPA expects next on {name} that it has not seen; patches are read '
                    'row by row')
    figure.savefig(path, dpi=150)
    plt.close(figure)


def plot_segmentation(scenes, segmentors, title, path, num=6):
    """Plot validation scenes, their labels, and what segmentors predict.

    Args:
        scenes (Path): Folder of the scenes, in ADE20K's layout.
        segmentors (dict[str, Path]): Folder of a finished training by title of its row.
        title (str): Title of the figure.
        path (Path): The image file.
        num (int): Number of scenes. Defaults to 6.
    """
    import matplotlib.pyplot as plt
    from matplotlib.patches import Patch
    import_mmseg()
    from mmseg.apis import inference_model, init_model

    images = sorted(map(str, scenes.glob('images/validation/*')))[:num]
    labels = sorted(scenes.glob('annotations/validation/*'))[:num]
    rows = {'image': [np.asarray(Image.open(image)) for image in images],
            'truth': [np.asarray(Image.open(label)).astype(int) - 1 for label in labels]}
    for row, folder in segmentors.items():
        config, = folder.glob('*.py')
        checkpoint, = folder.glob('iter_*.pth')
        with contextlib.redirect_stdout(io.StringIO()):
            model = init_model(str(config), str(checkpoint), device='cpu')
        rows[row] = [result.pred_sem_seg.data[0].numpy()
                     for result in inference_model(model, images)]
    classes = model.dataset_meta['classes']
    palette = np.array([*model.dataset_meta['palette'], [128, 128, 128]]) / 255  # -1: unlabelled
    figure, axes = plt.subplots(len(rows), num, figsize=(1.5 * num + 2, 1.5 * len(rows) + 0.8),
                                layout='constrained')
    for line, (name, panels) in zip(axes, rows.items()):
        for axis, panel in zip(line, panels):
            axis.imshow(panel if name == 'image' else palette[panel], cmap='gray', vmin=0, vmax=255,
                        interpolation='nearest')
            axis.set(xticks=[], yticks=[])
        line[0].set_ylabel(name, rotation=0, ha='right', va='center')
    figure.legend(handles=[Patch(color=colour, label=label) for colour, label
                           in zip(palette, (*classes, 'unlabelled edge'))],
                  loc='outside lower center', ncols=6, frameon=False)
    figure.suptitle(title)
    figure.savefig(path, dpi=150)
    plt.close(figure)
