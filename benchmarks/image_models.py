"""The image flows that ``benchmarks.images`` trains: ours, normflows' Glow and one of nflows.

Each has ``log_prob`` of grey levels k / L, a one-sample bound by uniform dequantization, and
``there_and_back`` of dequantized images x in [0, 1].
"""

import math

import torch
from torch import Tensor, nn

import flows.recipes
from flows.transforms import Dequantize, Logit

__all__ = ["NflowsGlow", "NormflowsGlow", "Ours"]


class Ours(nn.Module):
    """A recipe as its config describes it, but for noise that is uniform, as everybody's."""

    def __init__(self, config: dict) -> None:
        super().__init__()
        recipe = getattr(flows.recipes, config["class_path"].rpartition(".")[2])
        self.flow = recipe(**config["init_args"] | {"dequantize": "uniform"})

    @property
    def dequantize(self) -> Dequantize:
        return self.flow.transform.transforms[0]

    def log_prob(self, inputs: Tensor) -> Tensor:
        """One-sample bound, shape (batch,), nats, of images k / L."""
        return self.flow.log_prob(inputs)

    def there_and_back(self, x: Tensor) -> Tensor:
        """Dequantized images to noise and back."""
        layers = list(self.flow.transform.transforms)[1:]
        for layer in layers:
            x, _ = layer(x)
        for layer in reversed(layers):
            x, _ = layer.inverse(x)
        return x


class NormflowsGlow(nn.Module):
    """normflows' Glow as in its example: Glow blocks and a learned normal base per level.

    The logit takes its place where ``alpha`` is given; else images are shifted by half, as in
    the example. Its Merge leaves the second half of the channels to the next level.
    """

    def __init__(
        self,
        shape: tuple[int, int, int],
        grey_levels: int,
        *,
        levels: int,
        steps: int,
        hidden: int,
        alpha: float | None,
    ) -> None:
        import normflows as nf

        super().__init__()
        self.dequantize = Dequantize(grey_levels)
        channels, height, width = shape
        base, merges, blocks = [], [], []
        for level in range(levels):  # from noise to data: the coarsest level first
            deep = levels - level
            here = channels * 2 ** (deep + 1)
            glow = [nf.flows.GlowBlock(here, hidden, scale_map="sigmoid") for _ in range(steps)]
            blocks.append([*glow, nf.flows.Squeeze()])
            if level:
                merges.append(nf.flows.Merge())
            done = here if level == 0 else here // 2
            size = (done, height // 2**deep, width // 2**deep)
            base.append(nf.distributions.DiagGaussian(size))
        start = None if alpha is None else nf.transforms.Logit(alpha)
        self.shift = 0.5 if alpha is None else 0.0
        self.flow = nf.MultiscaleFlow(base, blocks, merges, start, class_cond=False)

    def log_prob(self, inputs: Tensor) -> Tensor:
        return self.flow.log_prob(self.dequantize(inputs)[0] - self.shift, None)

    def noise_and_base(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Noise (batch, features) and its log density (batch,)."""
        parts, _ = self.flow.inverse_and_log_det(x - self.shift)
        laws = zip(self.flow.q0, parts, strict=True)
        return torch.cat([z.flatten(1) for z in parts], 1), sum(q.log_prob(z) for q, z in laws)

    def there_and_back(self, x: Tensor) -> Tensor:
        noise, _ = self.flow.inverse_and_log_det(x - self.shift)
        return self.flow.forward_and_log_det(noise)[0] + self.shift


class NflowsGlow(nn.Module):
    """Steps of ActNorm, LU convolution and coupling of nflows, as in Neural Spline Flows' images.

    Every level ends in one more convolution, the conditioners are residual networks of 3x3
    convolutions, splines have linear tails. The logit takes its place where ``alpha`` is
    given; else images are shifted by half, as there.
    """

    def __init__(
        self,
        shape: tuple[int, int, int],
        grey_levels: int,
        *,
        levels: int,
        steps: int,
        hidden: int,
        blocks: int,
        dropout: float,
        spline: bool,
        alpha: float | None,
    ) -> None:
        from nflows import transforms
        from nflows.distributions import StandardNormal
        from nflows.flows import Flow
        from nflows.nn.nets import ConvResidualNet

        super().__init__()

        def net(in_channels: int, out_channels: int) -> nn.Module:
            return ConvResidualNet(
                in_channels,
                out_channels,
                hidden_channels=hidden,
                num_blocks=blocks,
                dropout_probability=dropout,
            )

        def coupling(channels: int, step: int) -> nn.Module:
            mask = torch.ones(channels)
            mask[step % 2 :: 2] = -1
            if not spline:
                return transforms.AffineCouplingTransform(mask, net)
            return transforms.PiecewiseRationalQuadraticCouplingTransform(
                mask, net, num_bins=8, tails="linear", tail_bound=5.0
            )

        multiscale = transforms.MultiscaleCompositeTransform(levels)
        channels, height, width = shape
        for _ in range(levels):
            channels, height, width = 4 * channels, height // 2, width // 2
            parts = [transforms.SqueezeTransform()]
            for step in range(steps):
                parts += [
                    transforms.ActNorm(channels),
                    transforms.OneByOneConvolution(channels),
                    coupling(channels, step),
                ]
            parts.append(transforms.OneByOneConvolution(channels))
            level = transforms.CompositeTransform(parts)
            hidden_shape = multiscale.add_transform(level, (channels, height, width))
            channels = channels if hidden_shape is None else hidden_shape[0]
        start = Logit(alpha) if alpha is not None else transforms.PointwiseAffineTransform(-0.5)
        self.dequantize = Dequantize(grey_levels)
        self.flow = Flow(
            transforms.CompositeTransform([start, multiscale]), StandardNormal([math.prod(shape)])
        )

    def log_prob(self, inputs: Tensor) -> Tensor:
        return self.flow.log_prob(self.dequantize(inputs)[0])

    def noise_and_base(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Noise (batch, features) and its log density (batch,)."""
        noise, _ = self.flow._transform(x)
        return noise, self.flow._distribution.log_prob(noise)

    def there_and_back(self, x: Tensor) -> Tensor:
        noise, _ = self.flow._transform(x)
        return self.flow._transform.inverse(noise)[0]
