"""Tasks on images: what `reward/*.yaml` name. Each is a guiding reward and a held-out one.

A learned reward is judged by a classifier of other images, so that over-optimisation shows. The rewards themselves are in `rewards`.
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from rgdiff import checks, guides
from rgdiff.domains.images import jpeg as jpeg_size
from rgdiff.domains.images import rewards as image_rewards
from rgdiff.domains.images.data import ImageDomain
from rgdiff.domains.images.judge import ImageJudge
from rgdiff.domains.images.reference import WITHOUT_IMAGES, PretrainedImages
from rgdiff.domains.images.rewards import InTurn, Restored
from rgdiff.rewards import Task, ensemble, weighted_sum
from rgdiff.typing import Array, Key, Reward


def digit(
    domain: ImageDomain | PretrainedImages,
    judge: ImageJudge,
    key: Key,
    target: int = 3,
    heads: int = 1,
    reduce: str = "lower",
    caution: float = 1.0,
    examples: int | None = None,
    judged: str = "classifier",
) -> Task:
    """Make the task: log p(target | x) of a classifier trained on the training split, evaluated on held-out images.

    Args:
      domain: images with labels.
      judge: the domain's judge, which trains the held-out classifier.
      key: of the classifiers' training.
      target: the class to be drawn, an integer label.
      heads, reduce, caution: several classifiers, trained from keys of their own and joined by `rewards.ensemble`, are harder
        to exploit than one.
      examples: images that they are trained on, all by default. A reward of fewer is exploited sooner.
      judged: by a `classifier` trained on the held-out split, or by `likeness` to its images of the target, which also
        detects samples that are like no image.

    Returns:
      The task; the rewards are in nats.

    Raises:
      ValueError: for a domain without labels, or a number of examples outside [classes, all].
    """
    _labelled(domain, "digit")
    checks.one_of("reward.target", target, range(domain.classes))
    classify = image_rewards.classifier_reward
    images: Any = domain
    if heads != 1 or examples is not None or judged != "classifier":
        _images(images)
    keys = [key] if checks.at_least("heads", heads, 1) == 1 else list(jax.random.split(key, heads))
    rows = None
    if examples is not None:
        every = len(images.train_x)
        if not domain.classes <= examples <= every:
            raise ValueError(f"reward.examples must be {domain.classes} (the classes) to {every}, got {examples}")
        rows = np.asarray(jax.random.permutation(jax.random.fold_in(key, heads), every))[:examples]
    heard = [classify(domain.classifier("train", k, rows), target) for k in keys]
    reward = heard[0] if heads == 1 else ensemble(heard, reduce, caution=caution)
    if checks.one_of("reward.judged", judged, ("classifier", "likeness")) == "classifier":
        return Task(reward, classify(judge.classifier, target), target)
    return Task(reward, image_rewards.likeness(images.heldout_x[images.heldout_y == target]), target)


def labelled(domain: ImageDomain | PretrainedImages, judge: ImageJudge, key: Key) -> Task:
    """Make the task of a conditional prior: log p(label | x) of the label that each sample was drawn with, every class in turn.

    Args:
      domain: images with labels.
      judge: the domain's judge, which trains the held-out classifier.
      key: of the classifier's training.

    Returns:
      The task; the rewards are in nats.

    Raises:
      ValueError: for a domain without labels.
    """
    _labelled(domain, "labelled")
    guide = domain.classifier("train", key)
    classify = image_rewards.classifier_reward
    reward, heldout = (InTurn(classify(one), domain.classes) for one in (guide, judge.classifier))
    return Task(reward, heldout, conditional=True)


def inpainted(
    domain: ImageDomain, judge: ImageJudge, key: Key, image: int = 0, hidden: str = "right", noise: float = 0.1
) -> Task:
    """Make the task: log-likelihood of half of a test image's pixels, measured with noise, in nats; evaluated by the other half.

    Args:
      domain: images.
      judge: the domain's judge, not used.
      key: of the measurement's noise.
      image: its number among the test images; its class is the task's target.
      hidden: the half that is not measured, left, right, top or bottom.
      noise: standard deviation in the unit of pixels, which span 2.

    Returns:
      The task.

    Raises:
      ValueError: for another domain, an image that does not exist, another half, or a noise that is not positive.
    """
    truth, target = _measured_image(domain, image)
    half = dict(zip(("left", "right", "top", "bottom"), ((1, 0), (1, 1), (0, 0), (0, 1)), strict=True))
    axis, far = half[checks.one_of("reward.hidden", hidden, half)]
    size = truth.shape[axis]
    index = jnp.arange(size).reshape((-1, 1, 1) if axis == 0 else (1, -1, 1))
    unseen = jnp.broadcast_to((index >= size // 2) == bool(far), truth.shape).astype(jnp.float32)
    y = truth + checks.positive("reward.noise", noise) * jax.random.normal(key, truth.shape)
    reward = guides.inpainting(1 - unseen, y, noise)
    return Task(reward, Restored(truth, jnp.where(unseen > 0, domain.value_range[0], y), unseen), target)


def downsampled(
    domain: ImageDomain, judge: ImageJudge, key: Key, image: int = 0, factor: int = 2, noise: float = 0.1
) -> Task:
    """Make the task: log-likelihood of a test image's block means, measured with noise, in nats; evaluated by all of its pixels.

    Args:
      domain: images.
      judge: the domain's judge, not used.
      key: of the measurement's noise.
      image: its number among the test images; its class is the task's target.
      factor: side of a block; it divides the image's sides.
      noise: standard deviation in the unit of pixels, which span 2.

    Returns:
      The task.

    Raises:
      ValueError: for another domain, an image that does not exist, a factor that does not divide its sides, or a noise that
        is not positive.
    """
    truth, target = _measured_image(domain, image)
    high, wide, channels = domain.shape
    checks.at_least("reward.factor", factor, 1)
    if high % factor or wide % factor:
        raise ValueError(
            f"images of {high} x {wide} pixels have no blocks of {factor} x {factor}; choose another reward.factor"
        )
    rows, columns = (np.kron(np.eye(n // factor), np.ones((1, factor)) / factor) for n in (high, wide))
    matrix = np.kron(np.kron(rows, columns), np.eye(channels))
    y = jnp.asarray(matrix @ np.asarray(truth, np.float64).reshape(-1), jnp.float32)
    y = y + checks.positive("reward.noise", noise) * jax.random.normal(key, y.shape)
    seen = jnp.asarray(np.asarray(y) @ matrix * factor**2, jnp.float32).reshape(domain.shape)
    reward = guides.linear(jnp.asarray(matrix, jnp.float32), y, noise, shape=domain.shape)
    return Task(reward, Restored(truth, seen, jnp.ones_like(truth)), target)


def _labelled(domain: Any, reward: str) -> None:
    """Refuse a domain that does not know its classes."""
    if not hasattr(domain, "classifier"):
        raise ValueError(f"reward={reward} is for images with labels; choose an image domain, e.g. domain=digits")


def _images(domain: Any) -> None:
    """Refuse a domain that has no images at hand."""
    if not hasattr(domain, "real"):
        raise ValueError("this reward measures an image; choose an image domain, e.g. domain=digits")
    if not len(domain.real()):
        raise ValueError(WITHOUT_IMAGES)


def _measured_image(domain: ImageDomain, image: int) -> tuple[Array, int]:
    _images(domain)
    count = len(domain.test_x)
    if checks.at_least("reward.image", image, 0) >= count:
        raise ValueError(f"reward.image is the number of a test image, 0 to {count - 1}, got {image}")
    return jnp.asarray(domain.test_x[image]), int(domain.test_y[image])


def symmetric() -> Task:
    """Make the task: left-right symmetry, evaluated by itself.

    Returns:
      The task.
    """
    return Task(image_rewards.symmetry(), image_rewards.symmetry())


def inked(target: float | None = None, slope: float = 1.0) -> Task:
    """Make the task: mean ink in [0, 1], or closeness to a target amount, times `slope`, evaluated by itself.

    Args:
      target: wanted mean ink in [0, 1]; None rewards more ink.
      slope: factor of the reward.

    Returns:
      The task.
    """
    reward = weighted_sum([image_rewards.ink(target)], [slope])
    return Task(reward, reward)


def compressible(level: int = 6) -> Task:
    """Make the task: minus the zlib size of the 8-bit image in bytes, a black box, evaluated by itself.

    Args:
      level: zlib's compression level, 0 to 9.

    Returns:
      The task.
    """
    return Task(image_rewards.compressibility(level), image_rewards.compressibility(level))


def jpeg(quality: int = 95, larger: bool = False, softness: float = 0.05, host: bool = False) -> Task:
    """Make the task: estimated size in kB of a JPEG file, differentiable, evaluated by the true size of the file that PIL writes.

    Args:
      quality: libjpeg's, 1 to 100.
      larger: reward large files; small ones by default.
      softness: of the estimate's rounding, > 0, without unit; 0.1 to 0.2 have larger gradients, and read more kB.
      host: guide by the true size, a black box.

    Returns:
      The task, on images [B, H, W, 1 or 3].

    Raises:
      ValueError: for another quality.
    """
    true = jpeg_size.exact(quality, larger=larger)
    estimate = jpeg_size.incompressibility if larger else jpeg_size.compressibility
    return Task(true if host else estimate(quality, softness), true)


def clip_score(
    folder: str,
    prompts: str | list[str] | None = None,
    file: str | None = None,
    heldout: Reward | Task | None = None,
    dtype: str = "float32",
) -> Task:
    """Make the task: likeness to a text by a CLIP of your own files, `logits_per_image`.

    Args:
      folder: of a CLIPModel, see `rgdiff.pretrained.rewards.clip_score`.
      prompts: a text or several; with several, every one in turn, or the one that a sample was drawn with.
      file: of prompts in their place, one a line or a JSON list.
      heldout: the reward or task that evaluates, another network's; itself by default, and over-optimisation is not seen.
      dtype: of the network's computation, float32 or bfloat16.

    Returns:
      The task, on images with 1 or 3 channels.

    Raises:
      ValueError: for files that are missing or do not fit, or both or neither of `prompts` and `file`.
    """
    from rgdiff.pretrained import rewards

    texts = _texts(prompts, file)
    return _judged(rewards.clip_score(folder, texts, dtype=dtype), heldout, len(texts))


def pick_score(
    folder: str,
    prompts: str | list[str] | None = None,
    file: str | None = None,
    tokenizer: str | None = None,
    heldout: Reward | Task | None = None,
    dtype: str = "float32",
) -> Task:
    """Make the task: human preference by PickScore's files.

    Args:
      folder: of PickScore_v1, see `rgdiff.pretrained.rewards.pick_score`.
      prompts: as `clip_score`.
      file: as `clip_score`.
      tokenizer: folder of CLIP's tokenizer, where it is not in `folder`.
      heldout: as `clip_score`.
      dtype: as `clip_score`.

    Returns:
      The task, on images with 1 or 3 channels.

    Raises:
      ValueError: as `clip_score`.
    """
    from rgdiff.pretrained import rewards

    texts = _texts(prompts, file)
    return _judged(rewards.pick_score(folder, texts, tokenizer=tokenizer, dtype=dtype), heldout, len(texts))


def hps_v2(
    path: str,
    prompts: str | list[str] | None = None,
    file: str | None = None,
    tokenizer: str | None = None,
    heldout: Reward | Task | None = None,
    dtype: str = "float32",
) -> Task:
    """Make the task: human preference by HPSv2's file.

    Args:
      path: of its safetensors file or folder, see `rgdiff.pretrained.rewards.hps_v2`.
      prompts: as `clip_score`.
      file: as `clip_score`.
      tokenizer: folder of CLIP's tokenizer, where it is not beside the weights.
      heldout: as `clip_score`.
      dtype: as `clip_score`.

    Returns:
      The task, on images with 1 or 3 channels.

    Raises:
      ValueError: as `clip_score`.
    """
    from rgdiff.pretrained import rewards

    texts = _texts(prompts, file)
    return _judged(rewards.hps_v2(path, texts, tokenizer=tokenizer, dtype=dtype), heldout, len(texts))


def aesthetic(folder: str, head: str, heldout: Reward | Task | None = None, dtype: str = "float32") -> Task:
    """Make the task: LAION's aesthetic score by files of CLIP ViT-L/14 and of its head.

    Args:
      folder: of the CLIPModel or CLIPVisionModelWithProjection.
      head: safetensors file of version 1 or 2, see `rgdiff.pretrained.rewards.aesthetic`.
      heldout: as `clip_score`.
      dtype: as `clip_score`.

    Returns:
      The task, on images with 1 or 3 channels.

    Raises:
      ValueError: for files that are missing or do not fit.
    """
    from rgdiff.pretrained import rewards

    return _judged(rewards.aesthetic(folder, head, dtype=dtype), heldout, 1)


def _texts(prompts: str | list[str] | None, file: str | None) -> list[str]:
    if (prompts is None) == (file is None):
        raise ValueError("give reward.prompts, a text or several, or reward.file, a file of them; one of the two")
    if file is not None:
        from rgdiff.pretrained import text

        return text.prompts(file)
    return [prompts] if isinstance(prompts, str) else list(prompts or ())


def _judged(reward: Reward, heldout: Reward | Task | None, texts: int) -> Task:
    """The task of a reward on so many texts; several are taken in turn where a sample has none of its own."""
    judge = heldout.heldout if isinstance(heldout, Task) else reward if heldout is None else heldout
    if texts == 1:
        return Task(reward, judge)
    own = isinstance(judge, InTurn)
    return Task(InTurn(reward, texts), judge if own else InTurn(judge, texts), conditional=True)
