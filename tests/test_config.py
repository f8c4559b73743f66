import json
from dataclasses import dataclass, field

import pytest

from config.config import load_config
from config.errors import UserError, nearest
from config.settings import AT_LEAST_ONE, setting
from distillation import objective
from distillation.plan import read_sample_prompts


@dataclass(frozen=True)
class TrajectorySettings:
    teacher_substeps: int = setting(4, "teacher steps a student step, 100 % of them used", bound=AT_LEAST_ONE)
    loss_type: str = field(default="mse", metadata={"help": "distance", "choices": ("mse", "huber")})


@dataclass(frozen=True)
class VelocitySettings:
    teacher_substeps: int = setting(8, "teacher steps a student step", bound=AT_LEAST_ONE)
    weights: tuple[float, ...] = (1.0,)
    on_policy: bool = False


OBJECTIVES = {"trajectory": TrajectorySettings, "velocity": VelocitySettings}


def settings_of(name):
    if name not in OBJECTIVES:
        raise UserError(f"expected one of {', '.join(OBJECTIVES)}{nearest(name, OBJECTIVES)}")
    return OBJECTIVES[name]


@pytest.fixture
def files(tmp_path, monkeypatch):
    """A working folder with prompts and a student config; `files(text)` writes recipe.toml into it."""
    monkeypatch.chdir(tmp_path)
    for name in ("data", "config"):
        (tmp_path / name).mkdir()
    (tmp_path / "data" / "static_prompts.txt").write_text("a cat\n")
    (tmp_path / "config" / "student_config.json").write_text("{}")
    return lambda text: (tmp_path / "recipe.toml").write_text(REQUIRED_KEYS + text)


REQUIRED = ["--teacher_path", "teacher", "--data_path", "data/static_prompts.txt"]
REQUIRED_KEYS = 'teacher_path = "teacher"\ndata_path = "data/static_prompts.txt"\n'  # two lines
TWO_PHASES = """
learning_rate = 1e-3
[[phase]]
objective = "velocity"
steps = 30
lr = 5e-4
[[phase]]
objective = "trajectory"
steps = 12
teacher_substeps = 2
"""


def load(*argv):
    return load_config([*REQUIRED, *argv], settings_of)


def load_recipe(*argv):
    return load_config(["--config", "recipe.toml", *argv], settings_of)


def error(call, *argv):
    with pytest.raises(UserError) as raised:
        call(*argv)
    message = str(raised.value)
    assert "\n" not in message
    return message


# ---------------------------------------------------------------------------------------------- command lines


CONTRACT = [
    *("--teacher_path", "Wan-AI/Wan2.2-T2V-A14B-Diffusers", "--student_config", "config/student_config.json"),
    *("--data_path", "data/static_prompts.txt", "--output_dir", "./outputs/wan_t2i", "--save_samples"),
    *("--sample_prompts", "A cat", "A dog", "A bird", "A fish"),
]


@pytest.mark.parametrize("more", [[], ["--distributed"], ["--multi_gpu"]])
def test_contract_command_lines(files, more):
    config = load_config(CONTRACT + more, settings_of)
    assert config.teacher.teacher_path == "Wan-AI/Wan2.2-T2V-A14B-Diffusers"
    assert config.sampling.sample_prompts == ("A cat", "A dog", "A bird", "A fish")
    assert config.sampling.save_samples and config.sampling.sample_dir == "outputs/wan_t2i/samples"
    assert (config.run.distributed, config.run.multi_gpu) == ("--distributed" in more, "--multi_gpu" in more)
    assert config.run.ddp_timeout == 3600.0


def test_defaults_are_resolved(files):
    config = load("--seed", "7")
    assert config.optimization.num_steps == 1000 and config.optimization.num_epochs is None
    assert config.sampling.sample_seed == 7 and config.sampling.sample_dir == "outputs/run/samples"
    (phase,) = config.phases
    assert (phase.objective, phase.steps, phase.learning_rate) == ("trajectory", 1000, 1e-5)
    assert phase.settings == {"teacher_substeps": 4, "loss_type": "mse"}
    assert config.notes == ()


def test_trackers(files):
    run = load("--output_dir", "outputs/tiny").run
    assert (run.report_to, run.tracker_project_name, run.run_name) == ((), "wan-distillation", "tiny")
    assert load("--report_to", "none").run.report_to == ("none",)
    for argv in (["--report_to", "tensorboard", "wandb"], ["--report_to", "tensorboard,wandb"]):
        assert load(*argv).run.report_to == ("tensorboard", "wandb")
    run = load("--report_to", "all", "--tracker_name", "pictures", "--run_name", "second").run
    assert (run.report_to, run.tracker_project_name, run.run_name) == (("all",), "pictures", "second")


def test_an_explicit_sample_seed_of_zero_is_kept(files):
    assert load("--seed", "7", "--sample_seed", "0").sampling.sample_seed == 0


@pytest.mark.parametrize(
    ("flags", "section", "name", "value"),
    [
        (["--lr", "0.5"], "optimization", "learning_rate", 0.5),
        (["--learning_rate", "0.5"], "optimization", "learning_rate", 0.5),
        (["--lr", "0.5", "--learning_rate", "5e-1"], "optimization", "learning_rate", 0.5),
        (["--lr", "1", "--lr", "0.5"], "optimization", "learning_rate", 0.5),
        (["--max_train_steps", "9"], "optimization", "num_steps", 9),
        (["--num_train_epochs", "9"], "optimization", "num_epochs", 9),
        (["--batch_size", "9"], "optimization", "train_batch_size", 9),
        (["--validation_prompts", "A cat"], "sampling", "sample_prompts", ("A cat",)),
        (["--mixed_precision"], "optimization", "mixed_precision", "bf16"),
        (["--mixed_precision", "fp16"], "optimization", "mixed_precision", "fp16"),
        (["--teacher_on_cpu"], "teacher", "teacher_device_strategy", "cpu"),
        (["--teacher_on_cpu", "--teacher_device_strategy", "cpu"], "teacher", "teacher_device_strategy", "cpu"),
        (["--no_use_ema"], "optimization", "use_ema", False),
        (["--negative_prompt="], "teacher", "negative_prompt", ""),
    ],
)
def test_flags(files, flags, section, name, value):
    assert getattr(getattr(load(*flags), section), name) == value


@pytest.mark.parametrize("given", [["health,vlm"], ["health", "vlm"], ["health,", "vlm"]])
def test_scores_are_named_with_commas_or_spaces(files, given):
    assert load("--score", *given).scoring.score == ("health", "vlm")


def test_the_scores_deadline_stays_well_under_the_process_groups(files):
    assert load().scoring.score_deadline == 300 and load("--ddp_timeout", "60").scoring.score_deadline == 15
    assert "--score_deadline" in error(load, "--ddp_timeout", "60", "--score_deadline", "31")


def test_no_scores_beside_scores_is_refused(files):
    assert load("--score", "none").scoring.score == ("none",)
    assert "--score" in error(load, "--score", "none,health") and "expected one of" in error(load, "--score", "heath")


def test_num_workers_is_taken_with_a_note(files):
    (note,) = load("--num_workers", "4").notes
    assert "dataloader_num_workers" in note and "not needed" in note


@pytest.mark.parametrize(("old", "today"), [("balanced", "shard"), ("gpu0", "replicate")])
def test_old_names_of_strategies_are_taken_and_explained(files, old, today):
    config = load("--teacher_device_strategy", old)
    assert config.teacher.device_strategy == today
    (note,) = config.notes
    assert note.startswith(f"--teacher_device_strategy {old} means {today} now: ")


def test_prompts_from_a_file(files):
    assert load("--sample_prompts", "data/static_prompts.txt").sampling.sample_prompts_file == "data/static_prompts.txt"
    assert load("--sample_prompts", "A cat.").sampling.sample_prompts_file is None
    assert load("--sample_prompts", "a.txt", "b.txt").sampling.sample_prompts_file is None


def test_samples_are_drawn_where_prompts_are_given(files):
    prompts = ["--sample_prompts", "A cat", "A dog"]
    sample_only = ["--sample_only", "--student_path", "outputs/x/student"]
    for argv, save_samples, drawn in [
        ([], False, []),
        (prompts, True, ["A cat", "A dog"]),
        (["--save_samples", *prompts], True, ["A cat", "A dog"]),
        (["--no_save_samples", *prompts], False, []),
        (["--no_save_samples", *prompts, *sample_only], False, ["A cat", "A dog"]),
        (["--sample_prompts", "data/static_prompts.txt"], True, ["a cat"]),
        (["--no_save_samples", "--sample_prompts", "data/static_prompts.txt"], False, []),
    ]:
        config = load(*argv)
        assert config.sampling.save_samples is save_samples, argv
        assert read_sample_prompts(config) == drawn, argv


def test_a_flag_turns_off_the_samples_of_a_recipe(files):
    files('save_samples = true\nsample_prompts = ["A cat"]\n')
    assert read_sample_prompts(load_recipe()) == ["A cat"]
    assert read_sample_prompts(load_recipe("--no_save_samples")) == []


def test_a_sample_prompt_that_is_not_utf8_is_refused_before_it_is_drawn(files):
    with pytest.raises(UserError, match="--sample_prompts 'a .udce4pfel': not UTF-8"):
        read_sample_prompts(load("--sample_prompts", "a \udce4pfel"))


def test_sample_only_needs_neither_teacher_nor_data(files):
    argv = ["--sample_only", "--student_path", "outputs/x/student", "--sample_prompts", "A cat"]
    assert load_config(argv, settings_of).student.student_path == "outputs/x/student"


def test_help_lists_sections_and_the_objective_in_use(files, capsys):
    with pytest.raises(SystemExit) as stopped:
        load_config(["--objective", "velocity", "--help"], settings_of)
    assert stopped.value.code == 0
    text = capsys.readouterr().out
    assert "--learning_rate" in text and "Objective velocity" in text and "--on_policy" in text
    assert "Objective trajectory" not in text
    with pytest.raises(SystemExit):
        load_config(["--help"], settings_of)
    assert "Objective trajectory" in capsys.readouterr().out


def test_to_dict_is_json(files):
    config = load("--sample_prompts", "A cat", "--num_steps", "5")
    facts = json.loads(json.dumps(config.to_dict()))
    assert facts["sampling"]["sample_prompts"] == ["A cat"]
    assert facts["phases"][0]["settings"]["teacher_substeps"] == 4 and facts["phases"][0]["steps"] == 5


# ---------------------------------------------------------------------------------------------- wrong flags


@pytest.mark.parametrize(
    ("flags", "parts"),
    [
        (["--learning_rat", "1"], ["unknown flag --learning_rat", "did you mean '--learning_rate'?"]),
        (["--teacher_substep=2"], ["unknown flag --teacher_substep;", "'--teacher_substeps'"]),
        (["--learning", "1"], ["unknown flag --learning"]),  # no abbreviations
        (["--heigth", "64"], ["'--height'"]),
        (["--batchsize", "2"], ["'--batch_size'"]),
        (["--save_sample"], ["'--save_samples'"]),
        (["--use_ema", "true"], ['unexpected argument "true"']),
        (["--lr"], ["--lr", "expected one argument"]),
        (["--lr", "1", "--learning_rate", "2"], ['--lr "1"', '--learning_rate "2"', "different values"]),
        (["--use_ema", "--no_use_ema"], ["--use_ema", "--no_use_ema", "different values"]),
        (["--teacher_on_cpu", "--teacher_device_strategy", "auto"], ["--teacher_on_cpu", "different values"]),
        (["--sampler", "ddmi"], ['--sampler "ddmi"', "ddim, renoise", "did you mean 'ddim'?"]),
        (["--report_to", "wandbd"], ["--report_to", "none, tensorboard, wandb, trackio, all", "'wandb'?"]),
        (["--report_to", "none", "wandb"], ["--report_to", "none stands alone"]),
        (["--batch_size", "2.5"], ['--batch_size "2.5"', "a whole number >= 1"]),
        (["--lr", "fast"], ['--lr "fast"', "a number > 0"]),
        (["--lr", "nan"], ["--lr", "a number > 0"]),
        (["--lr", "-1e-5"], ['--lr "-1e-5": expected a number > 0']),
        (["--lr", "-.5"], ['--lr "-.5": expected a number > 0']),
        (["--lr", "-1.e-5"], ['--lr "-1.e-5": expected a number > 0']),
        (["--ddp_timeout", "inf"], ["--ddp_timeout", "a number > 0"]),
        (["--objective", "velocty"], ['--objective "velocty"', "did you mean 'velocity'?"]),
        (["--on_policy"], ["unknown flag --on_policy"]),  # velocity's, and only trajectory runs
        (["--loss_type", "l1"], ['--loss_type "l1"', "mse, huber"]),
        (["--student_path", "x"], ["--student_path", "--sample_only"]),
        (["--no_save_samples", "--save_samples"], ["different values"]),
        (["--save_samples"], ["--sample_prompts is missing", "--save_samples"]),
        (["--student_config", "config/no.json"], ['--student_config "config/no.json"', "no such file"]),
        (["--sample_prompts", "no.txt"], ["--sample_prompts", "no.txt", "no such file"]),
        (["--output_dir", "data/static_prompts.txt"], ["--output_dir", "is a file"]),
        (["--sample_dir", "data/static_prompts.txt"], ["--sample_dir", "is a file"]),
        (["--prompt_cache_dir", "data/static_prompts.txt"], ["--prompt_cache_dir", "is a file"]),
        (["--config", "no.toml"], ["--config no.toml", "cannot be read"]),
    ],
)
def test_wrong_flags(files, flags, parts):
    message = error(load, *flags)
    assert all(part in message for part in parts), message


@pytest.mark.parametrize(
    "flags",
    [
        ["--allow_tf32"],
        ["--push_to_hub"],
        ["--snr_gamma", "5"],
        ["--snr_gamma=5"],
    ],
)
def test_flags_of_other_trainers_bring_no_misleading_hint(files, flags):
    assert error(load, *flags) == f"unknown flag {flags[0].split('=')[0]}; --help lists all"


def test_an_unknown_objective_is_named_once(files):
    message = error(load_config, [*REQUIRED, "--objective", "trajectry"], objective.settings_of)
    assert message.startswith('--objective "trajectry": expected one of ')
    assert message.endswith("; did you mean 'trajectory'?") and message.count("trajectry") == 1


@pytest.mark.parametrize(
    "flag",
    [
        *("lr", "num_steps", "num_epochs", "batch_size", "gradient_accumulation_steps", "max_grad_norm"),
        *("adam_epsilon", "ddp_timeout", "sample_interval", "logging_steps", "steps_per_epoch", "student_steps"),
        *("sample_steps", "sample_batch_size", "height", "flow_shift", "teacher_substeps"),
    ],
)
@pytest.mark.parametrize("value", ["0", "-1"])
def test_must_be_positive(files, flag, value):
    message = error(load, f"--{flag}", value)
    assert message.startswith(f'--{flag} "{value}": expected ')


@pytest.mark.parametrize(
    ("flag", "accepted", "refused"),
    [
        ("adam_beta1", ("0", "0.9"), ("1", "-0.1")),
        ("adam_beta2", ("0", "0.9"), ("1", "-0.1")),
        ("ema_decay", ("0", "0.999"), ("1", "-0.1")),
        ("sample_eta", ("0", "1"), ("1.1", "-0.1")),
        ("lr_warmup_steps", ("0", "5"), ("-1",)),
        ("student_steps", ("1", "1000"), ("0", "1001")),
        ("sample_steps", ("1", "1000"), ("0", "1001")),
        ("adam_weight_decay", ("0", "0.1"), ("-0.1",)),
        ("seed", ("0", "4294967295"), ("-1", "4294967296")),
    ],
)
def test_ranges(files, flag, accepted, refused):
    for value in accepted:
        load(f"--{flag}", value)
    for value in refused:
        assert error(load, f"--{flag}", value).startswith(f"--{flag} ")


@pytest.mark.parametrize(
    ("argv", "missing"),
    [
        (["--data_path", "data/static_prompts.txt"], "--teacher_path is missing"),
        (["--teacher_path", "teacher"], "--data_path is missing"),
        (["--teacher_path", "teacher", "--data_path", "data/no.txt"], "no such file"),
        (["--sample_only", "--sample_prompts", "A cat"], "--student_path is missing"),
        (["--sample_only", "--student_path", "s"], "--sample_prompts is missing"),
        (["--sample_only", "--student_path", "s", "--sample_prompts", "A", "--sample_teacher"], "--sample_teacher:"),
    ],
)
def test_missing(files, argv, missing):
    assert missing in error(load_config, argv, settings_of)


# ---------------------------------------------------------------------------------------------- recipes


def test_recipe_values_and_flags_over_them(files):
    files('lr = 1\nuse_ema = true\nsave_samples = true\nsample_prompts = ["A cat", "A dog"]\nteacher_substeps = 2\n')
    config = load_recipe()
    assert config.optimization.learning_rate == 1.0 and isinstance(config.optimization.learning_rate, float)
    assert config.optimization.use_ema and config.sampling.sample_prompts == ("A cat", "A dog")
    assert config.phases[0].settings["teacher_substeps"] == 2 and config.phases[0].learning_rate == 1.0
    config = load_recipe(
        "--learning_rate", "2", "--no_use_ema", "--sample_prompts", "A fish", "--teacher_substeps", "3"
    )
    assert config.optimization.learning_rate == 2.0 and not config.optimization.use_ema
    assert config.sampling.sample_prompts == ("A fish",)
    assert config.phases[0].settings["teacher_substeps"] == 3 and config.phases[0].learning_rate == 2.0


def test_recipe_shorthand_and_single_prompt(files):
    files('teacher_on_cpu = true\nsample_prompts = "data/static_prompts.txt"\n')
    assert load_recipe().teacher.teacher_device_strategy == "cpu"
    assert load_recipe("--teacher_device_strategy", "replicate").teacher.teacher_device_strategy == "replicate"
    assert load_recipe().sampling.sample_prompts_file == "data/static_prompts.txt"
    files("teacher_on_cpu = false\n")
    assert load_recipe().teacher.teacher_device_strategy == "auto"


@pytest.mark.parametrize(
    ("text", "parts"),
    [
        ("learning_rat = 1", ["recipe.toml: unknown key 'learning_rat'", "'learning_rate'"]),
        ("teacher_substep = 1", ["recipe.toml: unknown key 'teacher_substep'", "'teacher_substeps'"]),
        ('config = "other.toml"', ["recipe.toml: unknown key 'config'"]),
        ("[optimization]\nlr = 1", ["recipe.toml: unknown key 'optimization'"]),
        ("lr =", ["recipe.toml", "line 3, column 5"]),
        ("lr = 1\nlr 2", ["recipe.toml", "line 4, column 4"]),
        ("lr = 1\nseed = [", ["recipe.toml", "line 4, column 9, the end of the file"]),
        ("lr = 1\nlearning_rate = 2", ["recipe.toml: lr = 1", "recipe.toml: learning_rate = 2", "different values"]),
        ("teacher_on_cpu = true\nteacher_device_strategy = 'auto'", ["teacher_on_cpu = true", "different values"]),
        ("teacher_on_cpu = 1", ["teacher_on_cpu = 1", "true or false"]),
        ("num_steps = 2.0", ["recipe.toml: num_steps = 2.0", "a whole number"]),
        ("num_steps = true", ["recipe.toml: num_steps = true", "a whole number"]),
        ("num_steps = 0", ["recipe.toml: num_steps = 0", ">= 1"]),
        ("use_ema = 1", ["recipe.toml: use_ema = 1", "true or false"]),
        ('lr = "1e-4"', ['recipe.toml: lr = "1e-4"', "a number"]),
        ("lr = inf", ["recipe.toml: lr = ", "a number > 0"]),
        ("output_dir = 3", ["recipe.toml: output_dir = 3", "text"]),
        ("sample_prompts = [1]", ["recipe.toml: sample_prompts = [1]", "text"]),
        ('lr_scheduler = "cosin"', ['recipe.toml: lr_scheduler = "cosin"', "did you mean 'cosine'?"]),
        ('objective = "velocty"', ["recipe.toml: objective", "did you mean 'velocity'?"]),
        ('student_config = "no.json"', ['recipe.toml: student_config = "no.json"', "no such file"]),
        ("[phase]\nobjective = 'velocity'", ["recipe.toml", "[[phase]]"]),
        ("phase = 3", ["recipe.toml", "[[phase]]"]),
        ("[[phase]]\nsteps = 3", ["recipe.toml: [[phase]] 1: objective is missing"]),
        ("[[phase]]\nobjective = 'velocity'\nnum_steps = 3", ["[[phase]] 1: unknown key 'num_steps'; ", "have steps,"]),
        ("snr_gamma = 3", ["recipe.toml: unknown key 'snr_gamma'; keys are the flags' names"]),
        ("[[phase]]\nobjective = 'velocity'\nloss_type = 'mse'", ["[[phase]] 1: unknown key 'loss_type'"]),
        ("[[phase]]\nobjective = 'velocity'\nweights = [1, 'x']", ["[[phase]] 1: weights", "a number"]),
        ("[[phase]]\nobjective = 'velocity'\nsteps = 0", ["[[phase]] 1: steps = 0", ">= 1"]),
        ("[[phase]]\nobjective = 'velocity'\nlr = 1\nlearning_rate = 2", ["[[phase]] 1: lr = 1", "different values"]),
        ("[[phase]]\nobjective = 'velocty'", ["[[phase]] 1: objective", "'velocity'"]),
        ("objective = 'velocity'\n[[phase]]\nobjective = 'velocity'", ["objective", "stands beside [[phase]]"]),
    ],
)
def test_wrong_recipes(files, text, parts):
    files(text)
    message = error(load_recipe)
    assert all(part in message for part in parts), message


def test_a_recipe_that_is_not_utf8(files, tmp_path):
    (tmp_path / "recipe.toml").write_bytes(b'output_dir = "\xff"')
    assert "byte 14 is not UTF-8" in error(load_recipe)


# ---------------------------------------------------------------------------------------------- phases


def test_phases_and_what_wins(files):
    files("teacher_substeps = 6\n" + TWO_PHASES)
    config = load_recipe()
    velocity, trajectory = config.phases
    assert (velocity.objective, velocity.steps, velocity.learning_rate) == ("velocity", 30, 5e-4)
    assert velocity.settings == {"teacher_substeps": 6, "weights": (1.0,), "on_policy": False}
    assert (trajectory.objective, trajectory.steps, trajectory.learning_rate) == ("trajectory", 12, 1e-3)
    assert trajectory.settings == {"teacher_substeps": 2, "loss_type": "mse"}
    assert config.optimization.num_steps == 42 and config.optimization.num_epochs is None
    config = load_recipe("--teacher_substeps", "9", "--lr", "0.1", "--on_policy", "--lr_warmup_steps", "3")
    assert [phase.settings["teacher_substeps"] for phase in config.phases] == [9, 9]
    assert [phase.learning_rate for phase in config.phases] == [0.1, 0.1]
    assert [phase.lr_warmup_steps for phase in config.phases] == [3, 3]
    assert config.phases[0].settings["on_policy"]  # only velocity has it


@pytest.mark.parametrize("flag", ["--num_steps", "--num_train_epochs"])
def test_a_length_beside_several_phases(files, flag):
    files(TWO_PHASES)
    message = error(load_recipe, flag, "5")
    assert message.startswith(f'{flag} "5": ') and "--objective" in message and "recipe.toml" in message


def test_several_phases_need_steps(files):
    files(TWO_PHASES.replace("steps = 12\n", ""))
    assert "recipe.toml: [[phase]] 2: steps is missing" in error(load_recipe)


def test_one_phase_and_its_length(files):
    files("num_epochs = 3\n[[phase]]\nobjective = 'velocity'\nsteps = 30\n")
    for argv, steps, epochs in [
        ([], 30, 3),
        (["--num_steps", "5"], 5, None),
        (["--num_epochs", "2"], None, 2),
        (["--num_steps", "5", "--num_epochs", "2"], 5, 2),
    ]:
        config = load_recipe(*argv)
        assert (config.phases[0].steps, config.optimization.num_steps, config.optimization.num_epochs) == (
            *(steps, steps, epochs),
        ), argv


def test_a_single_phase_without_steps(files):
    files("num_steps = 7\n[[phase]]\nobjective = 'velocity'\n")
    assert load_recipe().phases[0].steps == 7


def test_objective_on_the_command_line_is_one_phase(files):
    files("loss_type = 'huber'\n" + TWO_PHASES)
    config = load_recipe("--objective", "velocity", "--num_steps", "5")
    (phase,) = config.phases
    assert (phase.objective, phase.steps, phase.learning_rate) == ("velocity", 5, 1e-3)
    assert phase.settings["teacher_substeps"] == 8 and "loss_type" not in phase.settings
    assert config.optimization.objective == "velocity"
    assert "unknown flag --loss_type" in error(load_recipe, "--objective", "velocity", "--loss_type", "mse")


# ---------------------------------------------------------------------------------------------- LoRA


def test_a_lora_s_names_and_defaults(files):
    student = load("--rank", "16").student
    assert (student.lora_rank, student.lora_alpha, student.merge_lora) == (16, None, False)
    assert load().student.lora_rank == 0


@pytest.mark.parametrize(
    "argv, named",
    [
        (["--lora_alpha", "8"], '--lora_alpha "8": there is no LoRA; give --lora_rank'),
        (["--merge_lora"], "--merge_lora: there is no LoRA; give --lora_rank"),
        (["--lora_rank", "-1"], '--lora_rank "-1": expected a whole number >= 0'),
        (["--lora_rank", "8", "--teacher_on_cpu"], "--teacher_on_cpu: keeps the teacher off the GPU, and --lora_rank"),
    ],
)
def test_settings_that_contradict_a_lora(files, argv, named):
    assert error(load, *argv).startswith(named)
