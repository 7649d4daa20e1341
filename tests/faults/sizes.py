"""Padding and RoPE for images of random sizes: what must hold for each of them."""
import torch
import torch.nn.functional as F

from nepa_mm.models.layers import PatchEmbed, RotaryEmbedding, rotate
from nepa_mm.models.vit import NEPAViT

from ..conftest import TINY


def patches(rng, num):
    """Yield what is wrong with the patches of each of ``num`` images, or None."""
    for _ in range(num):
        height, width, ph, pw = rng.integers(1, [70, 70, 17, 17]).tolist()
        image = torch.rand(1, 3, height, width)
        embed = PatchEmbed(3, 8, (ph, pw), 'pad')
        found, grid = embed(image)
        padded = torch.zeros(1, 3, -(-height // ph) * ph, -(-width // pw) * pw)
        padded[..., :height, :width] = image
        expected = F.conv2d(padded, embed.projection.weight, embed.projection.bias, (ph, pw))
        good = grid == expected.shape[2:] and torch.allclose(
            found, expected.flatten(2).transpose(1, 2), atol=1e-5)
        if height >= ph and width >= pw:
            embed.remainder = 'drop'
            cropped, grid = embed(image)
            whole = image[..., :height // ph * ph, :width // pw * pw]
            good &= grid == (height // ph, width // pw) and torch.equal(cropped, embed(whole)[0])
        yield None if good else f'image {height}x{width}, patch {ph}x{pw}'


def rope(rng, num):
    """Yield what is wrong with the rotation on each of ``num`` grids, or None.

    Lengths stay, prefix tokens stay, and the product of two rotated vectors depends on how far
    apart they are in rows and columns, and on nothing else.
    """
    for _ in range(num):
        rows, columns, prefix, quarter = rng.integers([1, 1, 0, 1], [12, 12, 5, 9]).tolist()
        dims = 4 * quarter
        sin, cos = RotaryEmbedding(dims).eval()((rows, columns), prefix, torch.device('cpu'))
        sin, cos = sin.double(), cos.double()
        x = torch.randn(1, 1, prefix + rows * columns, dims, dtype=torch.float64)
        turned = rotate(x, sin, cos)
        good = torch.equal(turned[:, :, :prefix], x[:, :, :prefix])
        good &= torch.allclose(turned.norm(dim=-1), x.norm(dim=-1))
        query, key = (rotate(torch.randn(1, 1, 1, dims, dtype=torch.float64), sin, cos)
                      [0, 0, prefix:].view(rows, columns, dims) for _ in range(2))
        products = torch.einsum('ijk,mnk->ijmn', query, key)
        good &= torch.allclose(products[1:, :, 1:], products[:-1, :, :-1], atol=1e-4)
        good &= torch.allclose(products[:, 1:, :, 1:], products[:, :-1, :, :-1], atol=1e-4)
        yield None if good else f'grid {rows}x{columns}, {prefix} prefix tokens, {dims} channels'


def backbone(rng, num):
    """Yield what is wrong with a padded, causal network on each of ``num`` images, or None.

    A map of the right shape, and no patch sees what comes after it.
    """
    torch.manual_seed(int(rng.integers(2 ** 31)))
    vit = NEPAViT(arch=TINY, patch_size=14, remainder='pad', out_type='featmap').eval()
    for _ in range(num):
        height, width = rng.integers(1, 100, 2).tolist()
        rows, columns = -(-height // 14), -(-width // 14)
        image = torch.rand(1, 3, height, width)
        changed, last = image.clone(), int(rng.integers(rows * columns))
        top, left = last // columns * 14, last % columns * 14
        changed[..., top:top + 14, left:left + 14] += 1
        with torch.no_grad():
            one, two = (vit(each)[0].flatten(2)[..., :last + 1] for each in (image, changed))
            shape = vit(image)[0].shape
        good = shape == (1, 32, rows, columns) and not torch.equal(one[..., -1], two[..., -1])
        good &= torch.allclose(one[..., :-1], two[..., :-1], atol=1e-6)
        yield None if good else f'image {height}x{width}, patch {last}'
