"""eMIGM's models and sampler against tensors recorded in float64 from the authors' code (MIT).

`data/emigm/model.safetensors` has random weights in the official format; the cases hold a run's settings, its orders
and the conditions of three steps, of the conditional branch. Only the first draw of the noise is used.
"""

import importlib.util
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from test_reference import RecordedNoise, relative_errors
from test_sampling import assert_equal_to_naive
from tools import MODEL, random_model
from torch import Tensor

from diffusion.solver import SOLVER_RULES
from models import (
    MAR,
    METHODS,
    PRESETS,
    CachePolicy,
    Method,
    Sampler,
    SolverSteps,
    create_model,
    find_method,
)
from models.lazymar.plan import DenoisingKind
from models.presets import ROOT
from util.download import FILES, main
from util.errors import InputError
from util.images import decode, encode
from util.options import parse_options
from util.weights import load_weights

DATA = Path(__file__).parent / "data" / "emigm"
CASES = ("16x8", "64x14")


FIELDS = {f"{part}_{name}": size for part in ("encoder", "decoder")
          for name, size in {"embed_dim": 64, "depth": 5, "num_heads": 4}.items()}  # fmt: skip
FIELDS |= {"class_num": 10, "diffloss_d": 4, "diffloss_w": 64}


def load_model() -> MAR:
    model = create_model("emigm_small", **FIELDS)
    model.load_state_dict(load_file(DATA / "model.safetensors"), strict=True)
    return model.double()


def load_case(case: str) -> dict[str, np.ndarray]:
    with np.load(DATA / f"case_emigm_{case}.npz", allow_pickle=False) as file:
        return dict(file)


def recorded_method(recorded: dict) -> Method:
    return Method(
        tokens_per_step=tuple(np.diff(recorded["known"]).tolist()),
        num_sampling_steps=SolverSteps(int(recorded["solver_steps"]), "singlestep"),
        guidance_interval=(float(recorded["guided_above"]), float(recorded["guided_up_to"])),
    )


def run(case: str, method: Method) -> tuple[Tensor, list[float]]:
    """Return latents, and the relative errors of the conditions of the recorded steps and of the latents."""
    recorded, model = load_case(case), load_model()
    plan = method.plan(model, cfg=float(recorded["cfg"]), cfg_schedule="constant")
    labels = torch.from_numpy(recorded["labels"])
    latents, errors = torch.empty(recorded["latents"].shape, dtype=torch.float64), []
    names = {0: "first", len(plan) // 2: "middle", len(plan) - 1: "last"}
    noise = RecordedNoise(f"emigm_{case}", recorded["orders"])
    for step in Sampler(model, plan).steps(labels, noise, latents):
        if step.step.index in names:
            expected = recorded[f"conditions_{names[step.step.index]}"]
            errors.append(relative_errors(step.conditions[: len(labels)], expected).max().item())
    last = relative_errors(latents.movedim(1, -1), np.moveaxis(recorded["latents"], 1, -1))
    return latents, [*errors, last.max().item()]


@pytest.mark.parametrize("case", CASES)
def test_conditions_and_latents_equal_the_authors(case: str) -> None:
    recorded = load_case(case)
    method = recorded_method(recorded)
    plan = method.plan(load_model(), cfg=float(recorded["cfg"]), cfg_schedule="constant")
    assert [step.cfg for step in plan] == recorded["cfg_per_step"].tolist()
    assert max(run(case, method)[1]) < 1e-9


MISTAKES = [
    {"num_sampling_steps": SolverSteps(7, "singlestep")},
    {"num_sampling_steps": SolverSteps(8)},
    {"guidance_interval": (0.13, 0.3)},
    {"guidance_interval": (0.1, 0.24)},
]


@pytest.mark.parametrize("changes", MISTAKES, ids=str)
def test_mistakes_are_seen(changes: dict) -> None:
    assert max(run("16x8", replace(recorded_method(load_case("16x8")), **changes))[1]) > 1e-7


# Against the definition

SOLVERS = [SolverSteps(count, rule) for rule in SOLVER_RULES for count in (2, 3, 4, 6, 8)]


@pytest.mark.parametrize("cfg", [1.0, 2.5])
@pytest.mark.parametrize("steps", SOLVERS, ids=str)
def test_the_sampler_computes_the_solvers_definition(steps: SolverSteps, cfg: float) -> None:
    assert_equal_to_naive("mar", size=2, num_iter=3, num_sampling_steps=steps, cfg=cfg, temperature=0.8)


@pytest.mark.parametrize("name", ["lazymar", "gtr", "recap", "lateguidance", "lazymar+gtr+lateguidance", "fast"])
def test_a_solver_composes_with_every_order_cache_and_guidance(name: str) -> None:
    assert_equal_to_naive(name, size=2, num_sampling_steps=SolverSteps(7))


@pytest.mark.parametrize("changes", [{}, {"num_iter": 8}, {"guidance_interval": (0.35, 0.9)}], ids=str)
@pytest.mark.parametrize("caches", [{}, {"condition_cache": False}, {"token_cache": False}], ids=str)
def test_lazymars_caches_on_emigm_compute_the_definition(changes: dict, caches: dict) -> None:
    cache = CachePolicy(start_step=8, refresh_interval=14, **caches)  # of 64 steps
    settings = {**METHODS["emigm"].changes, "cache": cache, "num_iter": 12, **changes}
    assert_equal_to_naive("lazymar", model=random_model(one_fake_token=True, patch_size=2), **settings)


def test_tokens_per_step_and_an_interval_compose() -> None:
    settings = {"tokens_per_step": (1, 2, 5, 4, 4), "guidance_interval": (0.1, 0.7)}
    assert_equal_to_naive("lazymar", size=3, **settings)


# Settings, presets and files


def test_the_head_cache_has_no_use_with_a_solver() -> None:
    plan = replace(find_method("lazymar"), num_sampling_steps=SolverSteps(8)).plan(MODEL, cfg=3.0)
    assert sum(len(head.kinds) for step in plan for head, _ in step.head_plans) == 64 * 8
    assert {(kind, head.skipped_blocks) for head in plan.distinct_head_plans for kind in head.kinds} == {
        (DenoisingKind.FULL, ())
    }


FEW_512, MANY_512 = (16, "solver:8:singlestep", (0.15, 0.35)), (64, "solver:14:singlestep", (0.25, 0.5))
PUBLISHED = [
    *((f"emigm_{size}", 16, "solver:8:singlestep", (0.1, 0.3)) for size in ("xsmall", "small", "base", "large")),
    *((f"emigm_{size}", 128, "solver:14:singlestep", (0.18, 0.6)) for size in ("xsmall", "small", "large")),
    ("emigm_base", 128, "solver:14:singlestep", (0.05, 0.4)),
    ("emigm_huge", 16, "solver:8:singlestep", (0.2, 0.4)),
    ("emigm_huge", 128, "solver:14:singlestep", (0.3, 0.7)),
    *((f"emigm_{size}_512", *row) for size in ("xsmall", "small", "base", "large") for row in (FEW_512, MANY_512)),
]


@pytest.mark.parametrize(("model", "num_iter", "solver", "interval"), PUBLISHED)
def test_each_preset_gets_its_published_settings(
    model: str, num_iter: int, solver: str, interval: tuple[float, float]
) -> None:
    steps = [] if num_iter == 16 else ["--num_iter", str(num_iter)]
    options = parse_options(["--model", model, "--method", "lazymar+emigm", *steps])
    method = options.method
    assert (method.num_iter, str(method.num_sampling_steps), method.guidance_interval) == (num_iter, solver, interval)
    assert (options.cfg, options.cfg_schedule) == (4.0, "constant")
    assert {step.cfg for step in options.plan} == {1.0, 4.0} and options.meta_model.seq_len == 256


@pytest.mark.parametrize("name", [name for name in PRESETS if name.startswith("emigm")])
def test_downloads_go_where_the_presets_look(name: str) -> None:
    assert ROOT / FILES[name].path == PRESETS[name].checkpoint
    assert PRESETS[name].vae_path == ROOT / FILES["dc_ae" if name.endswith("512") else "vae"].path
    assert FILES[name].url.startswith("https://huggingface.co/GSAI-ML/eMIGM/")


def test_the_hub_library_downloads(tmp_path, monkeypatch, capsys) -> None:
    def fetch(repository: str, name: str, local_dir: Path) -> None:
        if name.startswith("512"):
            raise OSError("no route to host")
        (local_dir / name).parent.mkdir(parents=True)
        (local_dir / name).write_bytes(repository.encode())

    monkeypatch.setattr("util.download.hf_hub_download", fetch)
    assert main(["emigm_base", "--output_dir", str(tmp_path)]) == 0
    assert (tmp_path / FILES["emigm_base"].path).read_bytes() == b"GSAI-ML/eMIGM"
    assert main(["emigm_base_512", "--output_dir", str(tmp_path)]) == 2
    assert "no route to host); check the network" in capsys.readouterr().err


def test_official_files_load_and_others_are_refused(tmp_path) -> None:
    weights = load_file(DATA / "model.safetensors")
    torch.save({"model": {}, "model_ema": weights}, tmp_path / "emigm.pth")
    model = create_model("emigm_small", **FIELDS)
    assert load_weights(model, tmp_path / "emigm.pth", what="emigm_small")
    assert model.mask_token is model.fake_latent and torch.equal(model.mask_token, weights["mask_token"].float())
    for own, other in [("emigm_base", "mar_base"), ("mar_base", "emigm_base"), ("emigm_base_512", "emigm_base")]:
        small = {"encoder_depth": 1, "decoder_depth": 1, "diffloss_d": 1, "diffloss_w": 8}
        torch.save(create_model(own, **small).state_dict(), tmp_path / "other.pth")
        with pytest.raises(InputError, match=f"holds weights of {own}, not of {other}"):
            load_weights(create_model(other, **small), tmp_path / "other.pth", what=other)


def test_512_pixels_need_diffusers(monkeypatch) -> None:
    if importlib.util.find_spec("diffusers"):
        with torch.device("meta"):
            vae = PRESETS["emigm_base_512"].make_vae()
        latents, pixels = torch.empty(2, 32, 4, 4, device="meta"), torch.empty(2, 3, 128, 128, device="meta")
        assert decode(vae, latents).shape == pixels.shape and encode(vae, pixels).shape == latents.shape
        assert 323e6 < sum(parameter.numel() for parameter in vae.parameters()) < 324e6
    monkeypatch.setitem(sys.modules, "diffusers", None)
    with pytest.raises(ValueError, match="pip install diffusers"):
        PRESETS["emigm_base_512"].make_vae()
    with pytest.raises(InputError, match=r"--model of 512 pixels needs .* `pip install diffusers`"):
        parse_options(["--model", "emigm_base_512", "--class_num", "7"])  # a number that is not cached


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ("--num_sampling_steps solver:1", "with N from 2 to 1000, not solver:1:multistep"),
        ("--num_sampling_steps solver:8:heun", "must be solver:N or solver:N:multistep|singlestep with N"),
        ("--num_sampling_steps solver:many", "--num_sampling_steps: invalid"),
        ("--guidance_interval 0.3:0.3", "--guidance_interval must be t_min:t_max with 0 <= t_min < t_max <= 1"),
        ("--guidance_interval 0.3:1.1", "--guidance_interval must be t_min:t_max"),
        ("--guidance_interval 0.3", "--guidance_interval: invalid"),
        ("--tokens_per_step 1,2", "--tokens_per_step must add up to the number of tokens, 256, not 3"),
        ("--tokens_per_step 256 --method gtr", "--tokens_per_step is for an order without stages"),
        ("--method emigm --num_iter 257", "--num_iter must be 1 to the number of tokens"),
    ],
)
def test_bad_input_names_the_flag(flags: str, message: str) -> None:
    with pytest.raises(InputError) as refused:
        parse_options(flags.split())
    assert message in str(refused.value) and "\n" not in str(refused.value)
