r"""Images against images, pair by pair; and sets of images against each other, by the features of a network.

.. math::
    \text{PSNR} = -10 \log_{10} \text{MSE}, \qquad
    \text{SSIM} = \operatorname{mean} \frac{(2 \mu_x \mu_y + c_1)(2 \sigma_{xy} + c_2)}
    {(\mu_x^2 + \mu_y^2 + c_1)(\sigma_x^2 + \sigma_y^2 + c_2)}

    \text{KID} = \text{MMD}^2 \text{ with } k(x, y) = (x^\top y / D + 1)^3

Images are arrays [N, C, H, W] or [N, H, W]: floats from 0 to 1, integers from 0 to 255, or from 0 to `top` where it is given.
What needs a trained network takes its weights from a file of yours, and nothing is downloaded.

References:
    | Image quality assessment (Wang et al., 2004), IEEE TIP 13
    | The unreasonable effectiveness of deep features as a perceptual metric (Zhang et al., 2018), arXiv:1801.03924
    | Improved techniques for training GANs (Salimans et al., 2016), arXiv:1606.03498
    | GANs trained by a two time-scale update rule (Heusel et al., 2017), arXiv:1706.08500
    | Demystifying MMD GANs (Bińkowski et al., 2018), arXiv:1801.01401
    | Improved precision and recall metric (Kynkäänniemi et al., 2019), arXiv:1904.06991
    | Reliable fidelity and diversity metrics (Naeem et al., 2020), arXiv:2002.09797
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

from probgen.errors import ProbgenError
from probgen.evaluate.finite import refuse_not_finite
from probgen.extras import need

DIM = 64  # integers that are nowhere brighter have hardly 255 for white
SPLITS = 10  # of the Inception score, as it is reported


def mse(x: Any, y: Any, top: float | None = None) -> np.ndarray:
    """The mean squared error of each image, [N], with white as 1."""
    x, y = _pairs(x, y, top)
    return ((x - y) ** 2).mean((1, 2, 3))


def psnr(x: Any, y: Any, top: float | None = None) -> np.ndarray:
    """The peak signal-to-noise ratio of each image, [N], in dB; infinite for equal images."""
    with np.errstate(divide="ignore"):
        return -10 * np.log10(mse(x, y, top))


def ssim(x: Any, y: Any, top: float | None = None, sigma: float = 1.5) -> np.ndarray:
    """The structural similarity of each image, [N], at most 1; by torchmetrics, which reflects the image at its edges.

    Means and variances are those under a Gaussian window of `sigma` pixels, cut at 3.5 sigma; c₁ = 0.01², c₂ = 0.03².
    """
    x, y = _pairs(x, y, top)
    reach = int(3.5 * sigma + 0.5)
    if reach >= min(x.shape[2:]):
        raise ProbgenError(
            f"ssim's window reaches {reach} pixels and cannot be reflected in images of {x.shape[2]} × {x.shape[3]}: "
            "take a smaller sigma"
        )
    measures = need("torchmetrics.functional.image", "quality", "ssim")
    import torch

    tensors = (torch.from_numpy(images) for images in (x, y))
    similarity = measures.structural_similarity_index_measure(*tensors, sigma=sigma, reduction="none", data_range=1.0)
    return similarity.reshape(-1).numpy()


def lpips(x: Any, y: Any, weights: str | Path, top: float | None = None) -> np.ndarray:
    """The learned perceptual distance of each image, [N], by AlexNet (version 0.1); grey images are taken as RGB.

    Args:
        x: images of 32 pixels a side or more.
        y: images of the same shape.
        weights: torchvision's AlexNet, the file `alexnet-owt-7be5be79.pth`; the linear heads come with torchmetrics.
        top: the value of white.
    """
    x, y = (_coloured(images) for images in _pairs(x, y, top))
    path = _weights_file(weights, "lpips", "AlexNet, alexnet-owt-7be5be79.pth")
    module = need("torchmetrics.functional.image.lpips", "quality", "lpips")
    import torch

    heads = torch.load(
        Path(module.__file__).parent / "lpips_models" / "alex.pth", weights_only=True, map_location="cpu"
    )
    trunk = _alexnet(torch.load(path, weights_only=True, map_location="cpu"))
    shift, scale = (torch.tensor(v).reshape(1, 3, 1, 1) for v in ((-0.030, -0.088, -0.188), (0.458, 0.448, 0.450)))
    layers = [(2 * torch.from_numpy(images).float() - 1 - shift) / scale for images in (x, y)]
    distance = torch.zeros(len(x))
    with torch.no_grad():
        for i, block in enumerate(trunk):
            layers = [block(layer) for layer in layers]
            a, b = (layer / (1e-8 + (layer**2).sum(1, keepdim=True)).sqrt() for layer in layers)
            distance += ((a - b) ** 2 * heads[f"lin{i}.model.1.weight"]).sum(1).mean((1, 2))
    return distance.numpy().astype(np.float64)


def _alexnet(state: dict[str, Any]) -> list[Any]:
    """The five convolutions of AlexNet, each with the ReLU behind it and the pooling before it."""
    from torch import nn

    places = {0: (3, 64, 11, 4, 2), 3: (64, 192, 5, 1, 2), 6: (192, 384, 3, 1, 1), 8: (384, 256, 3, 1, 1)}
    places[10] = (256, 256, 3, 1, 1)
    blocks = []
    for place, shape in places.items():
        convolution = nn.Conv2d(*shape)
        convolution.load_state_dict({k: state[f"features.{place}.{k}"] for k in ("weight", "bias")})
        pooling = [nn.MaxPool2d(3, 2)] if place in (3, 6) else []
        blocks.append(nn.Sequential(*pooling, convolution, nn.ReLU()))
    return blocks


def kid(
    features_x: Any, features_y: Any, subsets: int = 100, size: int | None = None, seed: int = 0
) -> tuple[float, float]:
    """The kernel distance of features [N, D] and [M, D], unbiased: its mean and standard deviation over random subsets.

    Unbiased, it may be below zero. The deviation is that of one subset and no standard error: subsets share rows.
    It is called KID only where the features are Inception's.

    Args:
        features_x: of samples.
        features_y: of real rows.
        subsets: how many are drawn.
        size: rows of each; 1,000 if there are twice as many, else half of those there are.
        seed: of the subsets.
    """
    x, y = _features(features_x, features_y, "kid")
    size = min(1000, len(x) // 2, len(y) // 2) if size is None else size
    if not 2 <= size <= min(len(x), len(y)):
        raise ProbgenError(f"kid draws subsets of 2 rows or more, and {size} of {len(x)} and {len(y)} were asked for")
    rng = np.random.default_rng(seed)
    found = [_kernel_distance(*(s[rng.permutation(len(s))[:size]] for s in (x, y))) for _ in range(subsets)]
    return float(np.mean(found)), float(np.std(found))


def _kernel_distance(x: np.ndarray, y: np.ndarray) -> float:
    def kernel(a: np.ndarray, b: np.ndarray) -> np.ndarray:
        inner = a @ b.T / a.shape[1] + 1
        return inner * inner * inner  # much quicker than a power

    within = sum((k.sum() - np.trace(k)) / (len(k) * (len(k) - 1)) for k in (kernel(x, x), kernel(y, y)))
    return float(within - 2 * kernel(x, y).mean())


def precision_recall_density_coverage(real: Any, fake: Any, k: int = 5) -> dict[str, float]:
    """Whether fake rows lie among real ones, and real among fake, by the k nearest neighbours of features [N, D] and [M, D].

    A row's ball reaches to the k-th nearest other row of its set. `precision`: the share of fake rows in some ball of a
    real one. `recall`: of real rows in some ball of a fake one. `density`: how many real balls a fake row lies in, over k;
    it may exceed 1. `coverage`: the share of real rows whose ball holds a fake one.

    Of two sets of one law, density is 1 on average and coverage 1 − Π_{i<k} (N − 1 − i) / (N + M − 1 − i), near 1 − 2⁻ᵏ
    for sets of one size. Precision and recall depend on the law: compare them with those of other real rows. Memory is
    that of the distances, 800 MB for 10,000 rows.
    """
    from scipy.spatial.distance import cdist

    real, fake = _features(real, fake, "precision_recall_density_coverage")
    if not 1 <= k < min(len(real), len(fake)):
        raise ProbgenError(f"the {k} nearest neighbours were asked for in sets of {len(real)} and {len(fake)} rows")
    across = cdist(real, fake)
    in_real, in_fake = across <= _radii(real, k)[:, None], across <= _radii(fake, k)[None, :]
    return {
        "precision": float(in_real.any(0).mean()),
        "recall": float(in_fake.any(1).mean()),
        "density": float(in_real.sum(0).mean() / k),
        "coverage": float(in_real.any(1).mean()),
    }


def _radii(rows: np.ndarray, k: int) -> np.ndarray:
    """The distance of each row from its k-th nearest other one."""
    from sklearn.neighbors import NearestNeighbors

    return NearestNeighbors(n_neighbors=k).fit(rows).kneighbors()[0][:, -1]


def inception_scores(
    samples: Any, real: Any, weights: str | Path, top: float | None = None, seed: int = 0
) -> dict[str, float]:
    """FID, KID and the Inception score, by the network that these names stand for; grey images are taken as RGB.

    Compare them with numbers from equally many images only: FID is biased, and below 2,048 images its covariances lack rank.

    Args:
        samples: images, of any size: the network scales them to 299 × 299.
        real: images.
        weights: the network's file, `weights-inception-2015-12-05-6726825d.pth` of torch-fidelity, which must be installed.
        top: the value of white.
        seed: of the subsets of KID and of the splits of the score.

    Returns:
        `fid`, `kid`, `kid_std`, `inception_score`, `inception_score_std`.
    """
    sets = [_coloured(_images(images, top, name)) for images, name in ((samples, "samples"), (real, "real"))]
    if min(map(len, sets)) < 2 * SPLITS:
        raise ProbgenError(
            f"inception_scores wants {2 * SPLITS} images or more, here {len(sets[0])} and {len(sets[1])}"
        )
    network = _inception(
        _weights_file(weights, "inception_scores", "Inception, weights-inception-2015-12-05-6726825d.pth")
    )
    fake, true = (_through(network, images) for images in sets)
    from probgen.evaluate.quality import frechet

    distance, deviation = kid(fake, true, seed=seed)
    score, spread = _inception_score(fake @ network.fc.weight.detach().double().numpy().T, seed)
    found = {"fid": frechet(fake, true), "kid": distance, "kid_std": deviation}
    return found | {"inception_score": score, "inception_score_std": spread}


def _inception(path: Path) -> Any:
    need("torch_fidelity", "inception", "inception_scores")
    module = need("torchmetrics.image.fid", "quality", "inception_scores")
    # Not torchmetrics' own default: the images are scaled as TensorFlow did, as in the numbers that others report.
    options = {"feature_extractor_weights_path": str(path), "antialias": False}
    return module.FrechetInceptionDistance(feature=2048, **options).inception


def _through(network: Any, images: np.ndarray, batch: int = 64) -> np.ndarray:
    """The 2,048 features of each image, which the network takes as bytes."""
    import torch

    rows = torch.from_numpy(np.round(images * 255).astype(np.uint8))
    with torch.no_grad():
        return torch.cat([network(part) for part in rows.split(batch)]).double().numpy()


def _inception_score(logits: np.ndarray, seed: int) -> tuple[float, float]:
    """exp E KL(p(y | x) ‖ p(y)), its mean and standard deviation over ten splits of the images."""
    from scipy.special import log_softmax

    logits = logits[np.random.default_rng(seed).permutation(len(logits))]
    scores = []
    for part in np.array_split(log_softmax(logits, axis=1), SPLITS):
        marginal = np.exp(part).mean(0)
        scores.append(np.exp((np.exp(part) * (part - np.log(marginal))).sum(1).mean()))
    return float(np.mean(scores)), float(np.std(scores))


def _pairs(x: Any, y: Any, top: float | None) -> tuple[np.ndarray, np.ndarray]:
    if np.shape(x) != np.shape(y):
        raise ProbgenError(
            f"images are compared pair by pair, and these sets have shapes {np.shape(x)} and {np.shape(y)}"
        )
    if top is None and (np.asarray(x).dtype.kind in "iu") != (np.asarray(y).dtype.kind in "iu"):
        kinds = f"{np.asarray(x).dtype} and {np.asarray(y).dtype}"
        raise ProbgenError(f"images of {kinds} have two ranges, 0 to 255 and 0 to 1: bring both to one")
    brightest = max(np.max(x, initial=0), np.max(y, initial=0))
    if top is None and np.asarray(x).dtype.kind in "iu" and 0 < brightest < DIM:  # digits of 16 greys, bits as integers
        raise ProbgenError(
            f"integers have 255 for white, and the brightest value is {brightest}: give the value of white as `top`"
        )
    return _images(x, top, "the first images"), _images(y, top, "the second images")


def _images(values: Any, top: float | None, name: str) -> np.ndarray:
    """[N, C, H, W] from 0 to 1, or refused."""
    values = np.asarray(values)
    if values.ndim not in (3, 4) or not values.size:
        raise ProbgenError(f"{name} have shape {values.shape}: images are [N, C, H, W] or [N, H, W]")
    top = (255.0 if values.dtype.kind in "iu" else 1.0) if top is None else top
    if not (values.min() >= 0 and values.max() <= top):  # false for NaN
        raise ProbgenError(
            f"{name} run from {values.min():g} to {values.max():g} and not from 0 to {top:g}, as {values.dtype} does: "
            "rescale them, or give the value of white as `top`"
        )
    values = values.astype(np.float64) / top
    return values[:, None] if values.ndim == 3 else values


def _coloured(images: np.ndarray) -> np.ndarray:
    if images.shape[1] not in (1, 3):
        raise ProbgenError(
            f"the network takes images of 1 or 3 channels, and these have {images.shape[1]}: [N, C, H, W]"
        )
    return np.repeat(images, 3, axis=1) if images.shape[1] == 1 else images


def _features(x: Any, y: Any, caller: str) -> tuple[np.ndarray, np.ndarray]:
    x, y = np.asarray(x, np.float64), np.asarray(y, np.float64)
    if x.ndim != 2 or y.ndim != 2 or x.shape[1] != y.shape[1]:
        raise ProbgenError(f"{caller} compares features [N, D] of one network, and these have {x.shape} and {y.shape}")
    for features, name in ((x, "the first features"), (y, "the second features")):
        refuse_not_finite(features, name)
    return x, y


def _weights_file(path: str | Path, caller: str, what: str) -> Path:
    if not Path(path).is_file():
        raise ProbgenError(
            f"{caller} finds no file {str(path)!r}: give the weights of {what}, as nothing is downloaded"
        )
    return Path(path)
