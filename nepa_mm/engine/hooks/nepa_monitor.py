"""Tells prediction from copying and collapse, which the loss alone cannot."""
import logging

import torch
import torch.nn.functional as F
from mmengine.dist import all_reduce
from mmengine.hooks import Hook
from mmengine.logging import print_log
from mmengine.model import is_model_wrapper
from mmengine.registry import HOOKS
from torch import Tensor


def effective_rank(rows: Tensor) -> Tensor:
    """The number of directions that a set of vectors uses (RankMe).

    This is the exponential of the entropy of the singular values, divided by their sum.
    Vectors are normalised but not centred: the cosine loss measures directions from the
    origin. Source: Roy and Vetterli 2007; Garrido et al. 2023 (arXiv 2210.02885).

    Args:
        rows (Tensor): (R, D).

    Returns:
        Tensor: Scalar from 1 to min(R, D), fp64; NaN if a value is not finite.
    """
    # On a GPU, eigenvalues of a D x D matrix cost a tenth of an SVD. They need fp64, which
    # other accelerators may lack.
    rows = F.normalize((rows if rows.is_cuda else rows.cpu()).double(), dim=1)
    if not rows.isfinite().all():
        return rows.new_tensor(float('nan'))
    singular = torch.linalg.eigvalsh(rows.T @ rows).clamp(min=0).sqrt()
    return torch.special.entr(singular / singular.sum()).sum().exp()


@torch.no_grad()
def prediction_statistics(h: Tensor, z: Tensor, shift: int = 1,
                          num_rows: int = 2048) -> dict[str, Tensor]:
    """Compare the outputs of one batch with the embeddings they read and predict.

    Both cosines use the outputs of patches 1 to N - shift: the class token has no patch to
    copy. They may therefore differ slightly from minus the loss.

    Args:
        h (Tensor): Outputs (B, 1 + n, D), class token first, n >= N - shift.
        z (Tensor): Embeddings of all N patches (B, N, D).
        shift (int): How many patches ahead the network predicts. 0 ("no shift" in Table 1a)
            is compared with the next patch. Defaults to 1.
        num_rows (int): Random sample of the B x N embeddings, and of the outputs, for
            spread and rank. Defaults to 2048.

    Returns:
        dict[str, Tensor]: Scalars.

        - ``next_cosine``: output against the patch to predict.
        - ``copy_cosine``: output against the patch just read.
        - ``lift``: ``next_cosine - copy_cosine``. Negative in a new network, which
          LayerScale makes almost the identity, and in a network that copies.
        - ``embedding_std``, ``output_std``: standard deviation of the normalised vectors,
          averaged over channels, in units of 1 / sqrt(D). About 1 for directions spread
          evenly around the origin, 0 for a single direction.
        - ``embedding_rank``, ``output_rank``: see :func:`effective_rank`.
    """
    z = F.normalize(z.float(), dim=-1, eps=1e-12)
    h = F.normalize(h.float(), dim=-1, eps=1e-12)[:, 1:]
    shift = max(shift, 1)
    n = z.shape[1] - shift
    next_cosine = (h[:, :n] * z[:, shift:]).sum(dim=-1).mean()
    copy_cosine = (h[:, :n] * z[:, :n]).sum(dim=-1).mean()
    result = dict(next_cosine=next_cosine, copy_cosine=copy_cosine,
                  lift=next_cosine - copy_cosine)
    for name, vectors in dict(embedding=z, output=h).items():
        vectors = vectors.flatten(0, 1)
        # a separate generator: the run's random state must not change
        order = torch.randperm(len(vectors), generator=torch.Generator().manual_seed(0))
        vectors = vectors[order[:num_rows].to(vectors.device)]
        result[f'{name}_std'] = (vectors.std(dim=0, correction=0).mean()
                                 * vectors.shape[1] ** 0.5)
        result[f'{name}_rank'] = effective_rank(vectors)
    return result


@HOOKS.register_module()
class NEPAMonitorHook(Hook):
    """Log :func:`prediction_statistics` of the training batch; warn of collapse and copying.

    Forward hooks take outputs and embeddings from the training step, so nothing is computed
    twice. Values go to ``train/...`` of the message hub, and from there to the log and to
    every visualisation backend. (``grad_norm`` comes from ``optim_wrapper.clip_grad``.)

    Each of two warnings is logged once, with its values:

    - collapse: ``embedding_std`` is below 0.1, a mean cosine of 0.99 between embeddings of
      arbitrary patches (Table 1a, no stop-gradient);
    - copying: ``lift`` is negative after the first fifth of the run and after
      ``copy_grace`` iterations (Table 1a, no shift). A healthy network starts as a copy and
      needs that long to stop copying.

    Args:
        interval (int, optional): Iterations between two measurements. None measures 100 times
            in a run of up to 10,000 iterations, and every 100 iterations in a longer one.
            Defaults to 100.
        num_images (int): Images of the local batch to measure. Defaults to 64.
        copy_grace (int): Iterations before copying is judged. Defaults to 1000.
        stop_on_collapse (bool): Whether collapse and copying raise an error instead of a
            warning. Defaults to False.

    Raises:
        ValueError: ``interval`` or ``num_images`` is not positive, or the model is not
            NEPA.
        RuntimeError: Collapse or copying, with ``stop_on_collapse``.
    """

    priority = 'ABOVE_NORMAL'   # before the timer, so that its cost does not count as data time
    MIN_STD, COPY_SHARE = 0.1, 0.2

    def __init__(self, interval: int | None = 100, num_images: int = 64, copy_grace: int = 1000,
                 stop_on_collapse: bool = False):
        if interval is not None and interval < 1 or num_images < 1:
            raise ValueError('interval and num_images must be positive, '
                             f'got {interval} and {num_images}.')
        self.interval, self.num_images = interval, num_images
        self.copy_grace, self.stop_on_collapse = copy_grace, stop_on_collapse
        self.caught, self.handles, self.warned = {}, [], set()

    def before_run(self, runner):
        """Derive the interval from the length of the run."""
        if self.interval is None:
            self.interval = min(max(runner.max_iters // 100, 1), 100)

    def before_train(self, runner):
        """Find the parts of the model."""
        self.model = runner.model.module if is_model_wrapper(runner.model) else runner.model
        if not hasattr(getattr(self.model, 'head', None), 'shift'):
            raise ValueError(f'{type(self).__name__} works only with a NEPA model, '
                             f'got {type(self.model).__name__}.')

    def before_train_iter(self, runner, batch_idx, data_batch=None):
        """Register forward hooks if this iteration is measured."""
        if self.every_n_train_iters(runner, self.interval):
            def catch(name, output):
                self.caught[name] = output[:self.num_images].detach()

            backbone = self.model.backbone
            self.handles = [
                backbone.patch_embed.register_forward_hook(lambda *args: catch('z', args[-1][0])),
                backbone.norm.register_forward_hook(lambda *args: catch('h', args[-1]))]

    def after_train_iter(self, runner, batch_idx, data_batch=None, outputs=None):
        """Measure, log and warn."""
        if not self.handles:
            return
        for handle in self.handles:
            handle.remove()
        self.handles = []
        self.caught['h'] = self.model.backbone.without_registers(self.caught['h'])
        result = prediction_statistics(**self.caught, shift=self.model.head.shift)
        self.caught = {}
        # the mean over all processes, so that all of them decide alike
        values = torch.stack([value.to(result['lift']) for value in result.values()])
        all_reduce(values, 'mean')
        result = dict(zip(result, values.tolist()))
        for name, value in result.items():
            runner.message_hub.update_scalar(f'train/{name}', value)
        self._judge(result, runner.iter + 1, runner.max_iters)

    def _judge(self, result, iteration, max_iters):
        if result['embedding_std'] < self.MIN_STD:
            self._warn('collapse', (
                'Collapse at iteration {}: the embeddings of all patches point the same way '
                '(embedding_std {embedding_std:.4f}, effective rank {embedding_rank:.1f}, '
                'next_cosine {next_cosine:.4f}).'
            ).format(iteration, **result))
        elif result['lift'] < 0 and iteration > max(self.COPY_SHARE * max_iters, self.copy_grace):
            self._warn('copying', (
                'Copying at iteration {}: the outputs resemble the patch just read (copy_cosine '
                '{copy_cosine:.4f}) more than the one to predict (next_cosine {next_cosine:.4f}, '
                'lift {lift:.4f}).').format(iteration, **result))

    def _warn(self, kind, message):
        if self.stop_on_collapse:
            raise RuntimeError(message)
        if kind not in self.warned:
            self.warned.add(kind)
            print_log(message, logger='current', level=logging.WARNING)
