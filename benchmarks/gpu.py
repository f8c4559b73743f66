"""How fast and how large the published teachers' shapes are on this GPU, with random weights.

    python benchmarks/gpu.py                                              # A14B and TI2V-5B, all parts
    python benchmarks/gpu.py --teachers a14b --sizes 480x832 --parts forward

forward   one expert's guided forward, a prompt at a time, with each of PyTorch's attention kernels; as a share of what
          a large matrix product reaches in the same run
training  a whole step of each objective through train_distillation.py's own loop, beside its network calls alone; and
          the peak of memory beside what the plan says
drawing   the parallel sampler against stock `WanPipeline` one prompt at a time; and 4 steps of a student against 40
          guided ones of its teacher

Training and drawing need a pipeline on disk: it has the teacher's shapes, fewer blocks (--blocks), a text encoder of
one layer, and stands in a temporary folder. Times are medians of warm runs; the teacher's 40 steps are drawn once.
"""

import argparse
import gc
import sys
import tempfile
from dataclasses import replace
from pathlib import Path
from statistics import median

if not __package__:  # run as a file: this folder, where this file would hide other packages, is not searched
    sys.path[0] = str(Path(__file__).resolve().parent.parent)

import diffusers
import torch
import transformers
from accelerate import init_empty_weights
from diffusers import AutoencoderKLWan, WanTransformer3DModel
from torch import nn
from transformers import UMT5Config, UMT5EncoderModel

from benchmarks import training
from benchmarks.arguments import at_least_one
from benchmarks.sampling import alone_on, compare_batches, draw_round, load_student
from benchmarks.shapes import TEACHERS, write_shapes
from benchmarks.timing import clock
from config.errors import UserError
from data.scenes import random_scenes
from distillation.memory import CUDA_BYTES
from distillation.objective import objective_names
from distillation.plan import make_plan
from distributed.process_group import init_process_group
from models.attention import check_attention_backend, use_attention_backend
from models.flow import few_step_grid
from models.folding import fold_text, fold_text_attention
from models.sizes import folded_length, wan_size
from models.student import parameter_dtype
from models.teacher import Expert, Teacher, TeacherInfo, WanVelocity, inspect_teacher, load_teacher, resolve_dtype
from models.tiny_wan import build_tokenizer

PARTS = ("forward", "training", "drawing")
BACKENDS = ("native", "_native_cudnn", "_native_flash", "_native_efficient", "_native_math")
SHARE_BAR, DRAWING_BAR = 0.6, 1.5
TEXT_TOKENS = 120
PRODUCT = {"cuda": 8192, "cpu": 1024}  # rows and columns of the matrix product that all is compared with
SPARE_MEMORY = 0.9  # of what is free, for one expert
STEPS, TEACHER_STEPS, PICTURES = 4, 40, 8


def product_flops(device: torch.device, dtype: torch.dtype, repeats: int) -> float:
    """Operations a second of a large matrix product."""
    n = PRODUCT[device.type]
    a, b = (torch.randn(n, n, device=device, dtype=dtype) for _ in range(2))
    return 2 * n**3 / clock(lambda: a @ b, device, repeats)


# ------------------------------------------------------------------------------------------------ what is measured


def random_transformer(config: dict, blocks: int, device: torch.device, dtype: torch.dtype) -> WanTransformer3DModel:
    """A frozen one with so many blocks, made where it is used: main memory may not hold it."""
    with init_empty_weights(include_buffers=False):
        transformer = WanTransformer3DModel.from_config(config | {"num_layers": blocks})
    for prefix, module in transformer.named_modules():
        for name, parameter in module.named_parameters(recurse=False):
            kind = parameter_dtype(f"{prefix}.{name}", dtype)
            weights = torch.empty(parameter.shape, device=device, dtype=kind).normal_(0, 0.02)
            module.register_parameter(name, nn.Parameter(weights, requires_grad=False))
    return fold_text_attention(transformer.to(device)).eval()


def save_pipeline(folder: Path, name: str, blocks: int, dtype: torch.dtype) -> TeacherInfo:
    """A whole pipeline of a teacher's shapes on disk, with fewer blocks."""
    home = write_shapes(folder, name)
    info = inspect_teacher(str(home))
    for part, config in info.transformer_configs.items():
        random_transformer(config, blocks, torch.device("cpu"), dtype).save_pretrained(home / part)
    tokenizer = build_tokenizer()
    width = info.transformer_configs["transformer"]["text_dim"]
    text = UMT5Config(vocab_size=len(tokenizer), d_model=width, d_kv=8, d_ff=8, num_layers=1, num_heads=1)
    UMT5EncoderModel(text).to(dtype).save_pretrained(home / "text_encoder")
    tokenizer.save_pretrained(home / "tokenizer")
    AutoencoderKLWan.from_config(info.vae_config).save_pretrained(home / "vae")
    return inspect_teacher(str(home))


def sizes_of(asked: list[tuple[int, int]], pixels: int) -> list[tuple[int, int]]:
    """Sizes cut to what a teacher can draw: multiples of `pixels`."""
    return [(height // pixels * pixels, width // pixels * pixels) for height, width in asked]


def blocks_that_fit(config: dict, device: torch.device, dtype: torch.dtype) -> int:
    """As many as the teacher has, or as one GPU holds of an expert."""
    size = wan_size(config)
    if device.type != "cuda":
        return size.layers
    free = SPARE_MEMORY * torch.cuda.mem_get_info(device)[0]
    rest = size.bytes(dtype) - size.layers * size.block_parameters * dtype.itemsize
    return min(size.layers, int((free - rest) // (size.block_parameters * dtype.itemsize)))


# ------------------------------------------------------------------------------------------------ forward


def forwards(name: str, sizes: list[tuple[int, int]], device: torch.device, dtype: torch.dtype, repeats: int) -> str:
    with tempfile.TemporaryDirectory() as folder:
        info = inspect_teacher(str(write_shapes(Path(folder), name)))
    config = info.transformer_configs["transformer"]
    blocks, layers = blocks_that_fit(config, device, dtype), config["num_layers"]
    size = wan_size(config | {"num_layers": blocks}, info.expand_timesteps)
    transformer = random_transformer(config, blocks, device, dtype)
    width = config["text_dim"]
    expert = Expert(WanVelocity(transformer, info.expand_timesteps, dtype), guidance_scale=5.0, t_min=0.0)
    teacher = Teacher([expert], torch.randn(TEXT_TOKENS, width))
    mask = torch.ones(1, TEXT_TOKENS, dtype=torch.bool, device=device)
    text = fold_text(torch.randn(1, TEXT_TOKENS, width, device=device), mask)
    reference = product_flops(device, dtype, repeats)
    lines = [
        f"{name}: {blocks} of {layers} blocks, {dtype}; a product of {PRODUCT[device.type]}² matrices runs at "
        f"{reference / 1e12:.3g} TFLOP/s\n",
        "| pixels | attention | a guided forward, s | TFLOP/s | of the product's | met |\n|---|---|---|---|---|---|",
    ]
    for height, width in sizes_of(sizes, info.pixels_per_patch):
        x = torch.randn(1, *info.latent_shape(height, width), device=device)
        flops = 2 * size.forward_flops(size.tokens(x.shape[1:]), folded_length(TEXT_TOKENS))
        for backend in BACKENDS:
            try:
                check_attention_backend(backend, device, dtype)
            except UserError as reason:  # the kernel's own words stand in brackets
                why = str(reason).partition(" (")[2].partition(");")[0]
                lines.append(f"| {height}×{width} | {backend} | not here: {why} | | | |")
                continue
            use_attention_backend(backend, transformer)
            seconds = clock(lambda x=x: teacher(x, 0.5, text), device, repeats)
            share = flops / seconds / reference
            lines.append(
                f"| {height}×{width} | {backend} | {seconds:.4f} | {flops / seconds / 1e12:.3g} | {share:.0%} | "
                f"{'yes' if share >= SHARE_BAR else 'NO'} |"
            )
    return "\n".join(lines)


# ------------------------------------------------------------------------------------------------ training


def training_steps(
    info: TeacherInfo, objectives: list[str], height: int, width: int, device: torch.device, count: int
) -> str:
    blocks = info.transformer_configs["transformer"]["num_layers"]
    lines = [
        f"{info.folder.name}: {blocks} blocks a network, {height}×{width}, one prompt a step, bf16 with gradient "
        "checkpointing, EMA\n",
        "| objective | a step, s | its network calls alone, s | ratio | peak, GB | planned, GB | ratio |\n"
        "|---|---|---|---|---|---|---|",
    ]
    with tempfile.TemporaryDirectory() as folder:
        prompts = Path(folder) / "prompts.txt"
        prompts.write_text("\n".join(scene.caption for scene in random_scenes(32, seed=0, held_out=False)))
        flags = [
            "--teacher_path", str(info.folder), "--data_path", str(prompts), "--height", str(height), "--width",
            str(width), "--train_batch_size", "1", "--mixed_precision", "bf16", "--gradient_checkpointing", "--use_ema",
            "--prompt_cache_dir", str(Path(folder) / "text"),
        ]  # fmt: skip
        for objective in objectives:
            watch = training.measure(objective, count, flags, Path(folder) / objective)
            steps, alone, ratio = watch.medians()
            peak = f"{ratio:.3f} | {peak_cells(objective, flags, Path(folder) / f'{objective}_peak', device)}"
            lines.append(f"| {objective} | {steps:.3f} | {alone:.3f} | {peak} |")
    return "\n".join(lines)


def peak_cells(objective: str, flags: list[str], folder: Path, device: torch.device) -> str:
    """Peak of a short run, without the calls that `training` makes again; the plan's, and their ratio."""
    config = training.configure(objective, 3, flags, folder)
    ranks = init_process_group(config.run.ddp_timeout)
    planned = make_plan(config, ranks).memory.peak - CUDA_BYTES
    if device.type != "cuda":
        return f"not measured | {planned / 1e9:.2f} | "
    gc.collect()
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats(device)
    training.train(config)
    peak = torch.cuda.max_memory_allocated(device)
    return f"{peak / 1e9:.2f} | {planned / 1e9:.2f} | {peak / planned:.3f}"


# ------------------------------------------------------------------------------------------------ drawing


def drawing(info: TeacherInfo, height: int, width: int, device: torch.device, dtype: torch.dtype, repeats: int) -> str:
    student = load_student(info, PICTURES, device, dtype)
    round_ = student.round_of(height, width, STEPS)
    with tempfile.TemporaryDirectory() as folder:
        (against_stock, _), difference = compare_batches(student, round_, repeats, Path(folder), DRAWING_BAR)
        sampler = student.sampler(round_, Path(folder) / "few", alone_on(device))
        few = median(draw_round(student, round_, sampler) for _ in range(repeats))
        teacher = replace(student, field=load_teacher(info, device, dtype, student.text[0]))
        many = replace(round_, grid=few_step_grid(TEACHER_STEPS, info.flow_shift))
        seconds = draw_round(teacher, many, teacher.sampler(many, Path(folder) / "many", alone_on(device)))
    rates = [PICTURES / each for each in (against_stock.b, against_stock.a, seconds)]
    return (
        f"{info.folder.name}: {PICTURES} pictures of {height}×{width} in {STEPS} steps\n"
        f"  by the parallel sampler {rates[0]:.3g} a second, by stock calls one at a time {rates[1]:.3g}: "
        f"{against_stock.figure} (bar {against_stock.bar}: {'met' if against_stock.met else 'NOT met'})\n"
        f"  the two sides' pictures differ by at most {difference} of 255 grey levels\n"
        f"  in {TEACHER_STEPS} guided steps {rates[2]:.3g} a second: the student is {seconds / few:.1f} times as fast"
    )


# ------------------------------------------------------------------------------------------------ command line


def pixels(text: str) -> tuple[int, int]:
    height, width = map(int, text.split("x"))
    return height, width


pixels.__name__ = "size such as 480x832"  # argparse's errors name the type


def build_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0], allow_abbrev=False)
    add = parser.add_argument
    add("--teachers", nargs="+", choices=list(TEACHERS), default=["a14b", "ti2v_5b"])
    add("--sizes", nargs="+", type=pixels, default=[(480, 832), (720, 1280), (1024, 1024)], metavar="HxW")
    add("--parts", nargs="+", choices=PARTS, default=PARTS)
    add("--objectives", nargs="+", choices=objective_names(), default=objective_names(), metavar="NAME")
    add("--blocks", type=at_least_one, default=4, help="of each network in training and drawing (4)")
    add("--repeats", type=at_least_one, default=10, help="that medians are taken of (10)")
    add("--device", choices=("cuda", "cpu"), default="cuda")
    return parser


def main(argv: list[str]) -> None:
    args = build_parser().parse_args(argv)
    if args.device == "cuda" and not torch.cuda.is_available():
        print("error: --device cuda: no GPU is here; --device cpu takes hours at these shapes", file=sys.stderr)
        sys.exit(2)
    transformers.utils.logging.disable_progress_bar()
    device = torch.device(args.device)
    dtype = resolve_dtype("auto", device)
    where = torch.cuda.get_device_name() if args.device == "cuda" else f"CPU, {torch.get_num_threads()} threads"
    print(f"{where}, torch {torch.__version__}, CUDA {torch.version.cuda}, diffusers {diffusers.__version__}")
    for name in args.teachers:
        if "forward" in args.parts:
            print(f"\n{forwards(name, args.sizes, device, dtype, args.repeats)}", flush=True)
        if set(args.parts) == {"forward"}:
            continue
        with tempfile.TemporaryDirectory() as folder:
            info = save_pipeline(Path(folder), name, args.blocks, dtype)
            [(height, width)] = sizes_of(args.sizes[:1], info.pixels_per_patch)
            if "training" in args.parts:
                table = training_steps(info, args.objectives, height, width, device, args.repeats)
                print(f"\n{table}", flush=True)
            if "drawing" in args.parts:
                print(f"\n{drawing(info, height, width, device, dtype, args.repeats)}", flush=True)


if __name__ == "__main__":
    main(sys.argv[1:])
