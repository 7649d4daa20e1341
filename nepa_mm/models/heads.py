"""A classification head that mmpretrain lacks."""
from mmengine.registry import MODELS
from mmpretrain.models.heads import LinearClsHead
from timm.layers import AttentionPoolLatent
from torch import Tensor, nn


@MODELS.register_module()
class AttentiveClsHead(LinearClsHead):
    """Attentive probe: a learned query attends to all normalised tokens, a linear layer classifies.

    Inner blocks have no final norm: without a LayerNorm of its own the probe would depend on the
    scale of their features. Reads tokens (B, T, D), so the backbone needs ``out_type='raw'``.

    Args:
        num_classes (int): Number of classes.
        in_channels (int): Channels of a token, D.
        num_heads (int): Heads of the attention. Defaults to 12.
        **kwargs: ``loss``, ``topk``, ``cal_acc`` and ``init_cfg`` of mmpretrain's
            LinearClsHead.
    """

    def __init__(self, num_classes: int, in_channels: int, num_heads: int = 12, **kwargs):
        super().__init__(num_classes=num_classes, in_channels=in_channels, **kwargs)
        self.norm = nn.LayerNorm(in_channels)
        self.pool = AttentionPoolLatent(in_channels, num_heads=num_heads)

    def pre_logits(self, feats: tuple[Tensor, ...]) -> Tensor:
        """Pool the tokens of the last output: (B, T, D) -> (B, D)."""
        return self.pool(self.norm(feats[-1]))
