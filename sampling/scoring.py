"""Scores of pictures, each scorer a small class, and what a round's scores say as a whole.

health    without weights: contrast, sharpness, saturation, black or flat pictures; the collapse alarm
fidelity  PSNR and SSIM to the teacher's picture from the same noise: likeness, not quality
clip      likeness of picture and prompt to CLIP
vlm       a vision-language model's judgement, behind any server that speaks OpenAI's protocol

`sampling/in_flight.py` runs them while the next pictures are drawn.
"""

import asyncio
import base64
import json
import math
import os
import random
import threading
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image

from config.config import ScoringConfig
from config.errors import UserError

# Scorers in the order in which they are shown: the name in a narrow column, and what follows where there is room.
LABELS = {
    "health": ("health", ""),
    "fidelity": ("likeness", " to the teacher"),
    "clip": ("clip", ""),
    "vlm": ("vlm", ""),
}

FLAT = 0.01  # contrast under which a picture shows nothing
BLACK = 0.05  # luminance that 99 % of a black picture's pixels stay under
THREAD_NAME = "scorer"
THUMBPRINT = 8  # pixels a side, of what pictures of different prompts are compared by
SAME = 1e-6  # contrasts, sharpnesses and saturations under this are as good as zero
EQUAL_PSNR = 100.0  # dB; of equal pictures, where the formula gives infinity
# A round's mean over the teacher's beyond which it is warned of. A working 4-step student stays within 3 % in contrast
# and saturation; both move by a fifth before pictures look wrong. Sharpness reacts to grain and blur the most.
HEALTHY = {
    "contrast": (0.85, 1.15),
    "saturation": (0.8, 1.25),
    "sharpness": (0.6, 1.6),
    "distinctness": (0.8, math.inf),
}
ALIKE = 0.02  # distinctness under which pictures of different prompts are all the same, whatever the teacher's are

JUDGE_ATTEMPTS = 4
JUDGE_PAUSE = 1.0  # seconds, at most, before the second attempt; twice as long before each further one
JUDGE_BEST = 10
REASON = 300  # characters of a judge's reason
RETRIED = {408, 429}  # and 5xx: the server asks for it, or may be well again soon; all else would only fail again
JUDGE_ROLE = (
    f"You judge pictures that a text-to-image model has drawn. Score from 0 to {JUDGE_BEST} how well the picture "
    f"shows what its prompt asks for, and how free it is of faults: {JUDGE_BEST} is right in all details and flawless, "
    '0 has nothing to do with the prompt. Answer with JSON alone: {"score": number, "reason": "one short sentence"}'
)

T = TypeVar("T")


@dataclass(frozen=True)
class Shot:
    """A picture to be scored. `reference`: the teacher's picture of the same prompt and noise, where there is one."""

    path: Path
    prompt: str
    reference: Path | None = None


class Scorer:
    """Gives a picture a score, and figures that explain it.

    timeout: seconds that one call may take.
    at_once: calls at the same time; None leaves it to the engine.
    """

    name: str
    at_once: int | None = 1  # what computes here takes its time from drawing

    def __init__(self, timeout: float) -> None:
        self.timeout = timeout

    async def score(self, shot: Shot) -> dict[str, Any] | None:
        """{"score": a number, …}, or None where this scorer has nothing to say of such a picture. Errors may escape."""
        return await in_thread(self.measure, shot)

    def measure(self, shot: Shot) -> dict[str, Any] | None:
        """The same, computed in place."""
        raise NotImplementedError


def build_scorers(config: ScoringConfig, device: torch.device) -> list[Scorer]:
    """Those that --score names, ready to work."""
    makers: dict[str, Callable[[], Scorer]] = {
        "health": lambda: Health(config.scorer_timeout),
        "fidelity": lambda: Fidelity(config.scorer_timeout),
        "clip": lambda: Clip(config.clip_model, device, config.scorer_timeout),
        "vlm": lambda: Judge(config.judge_model, config.judge_base_url, config.judge_timeout),
    }
    return [makers[name]() for name in dict.fromkeys(config.score) if name != "none"]


def check_scorers(config: ScoringConfig) -> None:
    """Raises UserError where a scorer that --score names could not work. No weight is loaded."""
    if "clip" in config.score:
        from transformers import CLIPConfig

        accepted = "accepted is a CLIP model's folder or hub id"
        try:
            facts, _ = CLIPConfig.get_config_dict(config.clip_model)
        except (OSError, ValueError) as error:
            reason = str(error).split("\n")[0]
            raise UserError(f"--clip_model {config.clip_model}: {reason}; {accepted}") from None
        if facts.get("model_type") != "clip":
            raise UserError(f"--clip_model {config.clip_model}: holds no CLIP model; {accepted}")
    if "vlm" in config.score:
        if not config.judge_model:
            raise UserError("--score vlm: needs --judge_model, a model's name as the judge's server knows it")
        if config.judge_base_url and not config.judge_base_url.startswith(("http://", "https://")):
            raise UserError(
                f"--judge_base_url {config.judge_base_url}: accepted is an address such as http://localhost:8000/v1"
            )
        if not config.judge_base_url and not os.environ.get("OPENAI_API_KEY"):
            raise UserError(
                "--score vlm: needs --judge_base_url, such as http://localhost:8000/v1, or a key in OPENAI_API_KEY"
            )
        try:
            import openai  # noqa: F401
        except ImportError:
            raise UserError(
                "--score vlm: needs the package openai, which is not installed; pip install openai"
            ) from None


def label_of(scorer: str) -> str:
    """What a scorer is called before people: "fidelity" would promise too much."""
    return "".join(LABELS.get(scorer, (scorer,)))


def is_hanging() -> bool:
    """Whether a scorer that was given up still computes."""
    return any(thread.name == THREAD_NAME for thread in threading.enumerate())


async def in_thread(work: Callable[..., T], *args: Any) -> T:
    """`work(*args)` in a thread of its own. Unlike asyncio's, it does not keep the program from ending if it hangs."""
    loop = asyncio.get_running_loop()
    future = loop.create_future()

    def settle(result: Any, error: Exception | None) -> None:
        if future.done():  # given up in the meantime
            return
        if error:
            future.set_exception(error)
        else:
            future.set_result(result)

    def run() -> None:
        result, error = None, None
        try:
            result = work(*args)
        except Exception as failure:  # handed to whoever waits
            # A future takes no StopIteration.
            error = RuntimeError(repr(failure)) if isinstance(failure, StopIteration) else failure
        loop.call_soon_threadsafe(settle, result, error)

    threading.Thread(target=run, daemon=True, name=THREAD_NAME).start()
    return await future


# ------------------------------------------------------------------------------------------------ without weights


class Health(Scorer):
    """Whether a picture is like pictures at all. 1: contrast, sharpness and saturation are the teacher's; 0: black or
    flat. In between: the one of the three that is furthest off, as a ratio. Without the teacher's picture: 1 or 0."""

    name = "health"

    def measure(self, shot: Shot) -> dict[str, Any]:
        picture = read_picture(shot.path)
        pixels = to_pixels(picture)
        figures = look(pixels)
        problem, score = fault(pixels), 1.0
        if shot.reference:
            wanted = to_pixels(read_picture(shot.reference))
            problem = None if problem == fault(wanted) else problem  # a night sky may be black
            score = min(_ratio(figures[key], value) for key, value in look(wanted).items())
        return {
            "score": 0.0 if problem else score,
            **figures,
            "problem": problem,
            "thumbprint": thumbprint(picture),
        }


def read_picture(path: Path) -> Image.Image:
    with Image.open(path) as picture:
        return picture.convert("RGB")


def to_pixels(picture: Image.Image) -> np.ndarray:
    """(H, W, 3) in [0, 1]."""
    return np.asarray(picture, np.float32) / 255


def luminance(pixels: np.ndarray) -> np.ndarray:
    """(H, W) of (H, W, 3), by ITU-R BT.601."""
    return pixels @ np.array([0.299, 0.587, 0.114], np.float32)


def look(pixels: np.ndarray) -> dict[str, float]:
    """Of a picture (H, W, 3) in [0, 1]: contrast, the standard deviation of its luminance; sharpness, that of the
    luminance's Laplacian; saturation, the mean distance between the largest and the smallest channel."""
    grey = luminance(pixels)
    inner = grey[1:-1, 1:-1]
    laplacian = grey[:-2, 1:-1] + grey[2:, 1:-1] + grey[1:-1, :-2] + grey[1:-1, 2:] - 4 * inner
    return {
        "contrast": float(grey.std()),
        "sharpness": float(laplacian.std()),
        "saturation": float((pixels.max(-1) - pixels.min(-1)).mean()),
    }


def fault(pixels: np.ndarray) -> str | None:
    grey = luminance(pixels)
    if np.quantile(grey, 0.99) < BLACK:
        return "black"
    # A flat colour has no luminance contrast; two colours of one luminance have none either, but differ.
    return "flat" if pixels.std((0, 1)).max() < FLAT else None


def thumbprint(picture: Image.Image) -> np.ndarray:
    """(8·8·3,) in [0, 1]: the picture's large shapes and colours."""
    return to_pixels(picture.resize((THUMBPRINT, THUMBPRINT), Image.Resampling.BOX)).ravel()


def _ratio(a: float, b: float) -> float:
    """The smaller over the larger."""
    small, large = sorted((a, b))
    return 1.0 if large < SAME else small / large


class Fidelity(Scorer):
    """Likeness to the teacher's picture of the same prompt and noise: SSIM, and PSNR in dB. A student may well draw
    another picture that is just as good."""

    name = "fidelity"

    def measure(self, shot: Shot) -> dict[str, Any] | None:
        if not shot.reference:
            return None
        a, b = (to_pixels(read_picture(path)) for path in (shot.path, shot.reference))
        if a.shape != b.shape:
            return None
        similarity = ssim(luminance(a), luminance(b))
        return {"score": similarity, "ssim": similarity, "psnr": psnr(a, b)}


def psnr(a: np.ndarray, b: np.ndarray) -> float:
    """Peak signal-to-noise ratio in dB of two pictures in [0, 1]; 100 where they are equal."""
    error = float(np.square(a.astype(np.float64) - b).mean())
    return min(EQUAL_PSNR, -10 * math.log10(error)) if error else EQUAL_PSNR


def ssim(a: np.ndarray, b: np.ndarray) -> float:
    """Mean structural similarity of two pictures (H, W) in [0, 1]; 1 where they are equal (Wang et al. 2004, eq. 13).

    As in the paper: windows of 11 × 11 pixels under a Gaussian of 1.5, wholly inside the picture; C₁ = .01², C₂ = .03².
    """
    size = min(11, *a.shape)
    steps = torch.arange(size, dtype=torch.float64) - (size - 1) / 2
    kernel = torch.exp(-(steps**2) / (2 * 1.5**2))
    kernel = kernel / kernel.sum()

    def local_mean(x: torch.Tensor) -> torch.Tensor:  # (H, W) → (H − 10, W − 10)
        x = F.conv2d(x[None, None], kernel.view(1, 1, -1, 1))
        return F.conv2d(x, kernel.view(1, 1, 1, -1))[0, 0]

    x, y = (torch.from_numpy(picture.astype(np.float64)) for picture in (a, b))
    mean_x, mean_y = local_mean(x), local_mean(y)
    var_x, var_y = local_mean(x * x) - mean_x**2, local_mean(y * y) - mean_y**2
    covariance = local_mean(x * y) - mean_x * mean_y
    c1, c2 = 0.01**2, 0.03**2
    similarity = (2 * mean_x * mean_y + c1) * (2 * covariance + c2)
    return float((similarity / ((mean_x**2 + mean_y**2 + c1) * (var_x + var_y + c2))).mean())


# ------------------------------------------------------------------------------------------------ with weights


class Clip(Scorer):
    """100 × the cosine between CLIP's embeddings of picture and prompt (Hessel et al. 2021, without their factor)."""

    name = "clip"

    def __init__(self, model: str, device: torch.device, timeout: float) -> None:
        super().__init__(timeout)
        from transformers import CLIPModel, CLIPProcessor

        dtype = torch.float16 if device.type == "cuda" else torch.float32
        self.model = CLIPModel.from_pretrained(model, dtype=dtype, use_safetensors=True).to(device).eval()
        self.processor = CLIPProcessor.from_pretrained(model)

    @torch.no_grad()
    def measure(self, shot: Shot) -> dict[str, Any]:
        picture = read_picture(shot.path)
        inputs = self.processor(text=[shot.prompt], images=[picture], return_tensors="pt", truncation=True)
        inputs["pixel_values"] = inputs["pixel_values"].to(self.model.dtype)
        output = self.model(**inputs.to(self.model.device))
        cosine = F.cosine_similarity(output.image_embeds.float(), output.text_embeds.float())
        return {"score": 100 * cosine.item()}


class Judge(Scorer):
    """A vision-language model is shown prompt and picture, and answers with a score from 0 to 10 and a reason.

    The key is OPENAI_API_KEY in the environment; a server of one's own mostly needs none.
    """

    name = "vlm"
    at_once = None

    def __init__(self, model: str, base_url: str | None, timeout: float) -> None:
        super().__init__(timeout)
        import openai

        self.model, self.key = model, os.environ.get("OPENAI_API_KEY") or "none"
        # Retries are ours: the client's own would also repeat what only fails again.
        self.client = openai.AsyncOpenAI(base_url=base_url, api_key=self.key, max_retries=0, timeout=timeout)

    async def score(self, shot: Shot) -> dict[str, Any]:
        encoded = base64.b64encode(await in_thread(shot.path.read_bytes)).decode()
        question = [
            {"type": "text", "text": f"The prompt: {json.dumps(shot.prompt, ensure_ascii=False)}"},
            {"type": "image_url", "image_url": {"url": f"data:image/png;base64,{encoded}"}},
        ]
        messages = [{"role": "system", "content": JUDGE_ROLE}, {"role": "user", "content": question}]
        try:
            return read_judgement(await self._ask(messages))
        except Exception as error:  # some servers say the key that they refuse
            if self.key == "none" or self.key not in str(error):
                raise
            raise RuntimeError(str(error).replace(self.key, "(key)")) from None

    async def _ask(self, messages: list[dict]) -> str:
        import openai

        for attempt in range(1, JUDGE_ATTEMPTS + 1):
            try:
                answer = await self.client.chat.completions.create(model=self.model, messages=messages)
                return answer.choices[0].message.content or ""
            except openai.APIStatusError as error:
                if attempt == JUDGE_ATTEMPTS or not (error.status_code in RETRIED or error.status_code >= 500):
                    raise
                # Full jitter: ranks and pictures that were refused together do not come back together.
                await asyncio.sleep(random.uniform(0, JUDGE_PAUSE * 2 ** (attempt - 1)))
        raise AssertionError("the last attempt returns or raises")


def read_judgement(answer: str) -> dict[str, Any]:
    """{"score", "reason"} of a judge's answer: the last JSON object in it that has a score, whatever stands around it.
    Raises ValueError for an answer without a score from 0 to 10."""
    shown = answer if len(answer) <= 200 else f"{answer[:200]}…"
    judgement = None
    for begin in (i for i, character in enumerate(answer) if character == "{"):
        try:
            found, _ = json.JSONDecoder().raw_decode(answer, begin)
        except ValueError:
            continue
        judgement = found if "score" in found else judgement
    if judgement is None:
        raise ValueError(f"the judge's answer is no JSON with a score: {shown!r}")
    score = judgement["score"]
    if isinstance(score, bool) or not isinstance(score, (int, float)) or not 0 <= score <= JUDGE_BEST:
        raise ValueError(f"the judge's score is not from 0 to {JUDGE_BEST}: {shown!r}")
    return {"score": float(score), "reason": str(judgement.get("reason", ""))[:REASON]}


# ------------------------------------------------------------------------------------------------ a round as a whole


def compare_prompts(scores: dict[str, dict[str, dict]], prompts: dict[str, str]) -> None:
    """Turn the thumbprints in a round's health into distinctness: how far a picture is, on average, from those of other
    prompts (root mean square over all pixels and channels). In place.

    Args:
        scores: picture's file → scorer → its figures.
        prompts: picture's file → its prompt.
    """
    healths = {file: by["health"] for file, by in scores.items() if by.get("health", {}).get("ok")}
    prints = {file: health.pop("thumbprint") for file, health in healths.items()}
    files, stacked = list(prints), np.stack(list(prints.values())) if prints else None
    by_file = np.array([prompts[file] for file in files])
    for i, file in enumerate(files):
        others = by_file != by_file[i]
        if others.any():
            distances = np.sqrt(np.square(stacked[others] - stacked[i]).mean(1))
            healths[file]["distinctness"] = float(distances.mean())


def means(rows: list[dict]) -> dict[str, float]:
    """Scorer → mean score over a round's manifest rows. What failed does not enter."""
    return {
        name: _mean([row["scores"][name]["score"] for row in rows if _good(row, name)])
        for name in _scorers(rows)
        if any(_good(row, name) for row in rows)
    }


def failures(rows: list[dict]) -> dict[str, tuple[int, int]]:
    """Scorer → how many of a round's manifest rows it failed for, of how many it was asked about."""
    asked = {name: [row["scores"][name] for row in rows if name in row.get("scores", {})] for name in _scorers(rows)}
    return {name: (sum(not score["ok"] for score in scores), len(scores)) for name, scores in asked.items()}


def alarms(rows: list[dict], teacher_rows: list[dict]) -> list[str]:
    """What is wrong with a round as a whole, in words: signs of collapse, and scores that are missing.

    Args:
        rows, teacher_rows: manifest rows of the round, and of the teacher's, which may be empty. Compared is what both
            have drawn from the same prompt and noise in the same size.
    """
    found = []
    empty = [row for row in rows if _good(row, "health") and row["scores"]["health"].get("problem")]
    if empty:
        found.append(f"{len(empty)} of {len(rows)} pictures are black or flat, the first one {empty[0]['file']}")
    teachers = {same_noise(row): row for row in teacher_rows}
    pairs = [(row, teachers[same_noise(row)]) for row in rows if same_noise(row) in teachers]
    for figure, (lowest, highest) in HEALTHY.items():
        own = _mean(_figures(rows, figure))
        if figure == "distinctness" and own < ALIKE:
            found.append(f"pictures of different prompts are all the same (they differ by {own:.3f} of 1)")
            continue
        known = [pair for pair in pairs if all(_figures([row], figure) for row in pair)]
        own, wanted = (_mean(_figures([pair[i] for pair in known], figure)) for i in (0, 1))
        if known and wanted > SAME and not lowest <= own / wanted <= highest:
            what = "difference between prompts" if figure == "distinctness" else figure
            found.append(f"{what} is {own / wanted:.0%} of the teacher's")
    for name, (failed, asked) in failures(rows).items():
        if failed:
            found.append(f"{name} failed for {failed} of {asked} pictures")
    return found


def same_noise(row: dict) -> tuple:
    """What two manifest rows have in common when their pictures may be compared."""
    return row["prompt"], row["seed"], row["height"], row["width"]


def _scorers(rows: list[dict]) -> list[str]:
    return list(dict.fromkeys(name for row in rows for name in row.get("scores", {})))


def _good(row: dict, name: str) -> bool:
    return row.get("scores", {}).get(name, {}).get("ok", False)


def _figures(rows: list[dict], figure: str) -> list[float]:
    good = [row["scores"]["health"] for row in rows if _good(row, "health")]
    return [health[figure] for health in good if figure in health]


def _mean(values: list[float]) -> float:
    """NaN where there are none, which no comparison holds for."""
    return sum(values) / len(values) if values else math.nan
