"""Training: the schedule and loss of the head, the resumable loop, and the small pieces of `train.py`."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

import train
from diffusion.loss import HybridLoss
from diffusion.schedule import NoiseSchedule, respaced_timesteps
from models import PRESETS, AutoencoderKL, create_model
from util.errors import InputError
from util.training import loop, probe
from util.training.initialization import initialize_with_neighbours
from util.training.loop import fit
from util.training.muon import Muon, orthogonalize
from util.training.probe import ContextProbe, linear_errors, readout_errors


def test_respacing_keeps_the_first_and_last_timestep_and_rounds_the_strides_between():
    timesteps = respaced_timesteps(100)
    assert timesteps[:4] == [0, 10, 20, 30]
    assert timesteps[-2:] == [989, 999]
    assert len(set(timesteps)) == 100
    assert respaced_timesteps(1000) == list(range(1000))


@pytest.mark.parametrize("steps", [1, 1001])
def test_impossible_numbers_of_steps_are_refused(steps):
    with pytest.raises(ValueError, match="num_sampling_steps"):
        respaced_timesteps(steps)


def test_an_ancestral_step_keeps_the_marginal_of_the_forward_process():
    """With the true noise, x_t = a x0 + b e steps to a mean and a variance whose marginal is that of x_(t-1)."""
    schedule = NoiseSchedule.create(100)
    for index in (1, 50, 99):
        alpha_bar, previous = schedule.alpha_bars[index], schedule.alpha_bars[index - 1]
        x0_part = schedule.x_coefficient[index] * np.sqrt(alpha_bar)
        noise_part = schedule.x_coefficient[index] * np.sqrt(1 - alpha_bar) + schedule.eps_coefficient[index]
        smaller_variance = np.exp(2 * (schedule.log_std_base[index] - schedule.log_std_slope[index]))
        assert x0_part == pytest.approx(np.sqrt(previous), rel=1e-9)
        if index > 1:  # the first posterior variance is replaced by the second
            assert noise_part**2 + smaller_variance == pytest.approx(1 - previous, rel=1e-6)


def test_the_first_of_100_steps_multiplies_errors_by_316():
    # method: near t = 999 almost nothing of the token is left, and x0 is not clipped
    assert abs(NoiseSchedule.create(100).eps_coefficient[-1]) == pytest.approx(316, rel=0.01)


def test_the_bound_trains_the_variance_and_not_the_noise():
    outputs = torch.zeros(64, 8, requires_grad=True)
    noise = torch.randn(64, 4, generator=torch.Generator().manual_seed(0))
    squared_error, bound = HybridLoss(torch.device("cpu"))(
        lambda *_: outputs, torch.ones(64, 4), torch.empty(64, 0), torch.arange(64) * 15, noise
    )
    (gradient,) = torch.autograd.grad((squared_error + bound).sum(), outputs)
    torch.testing.assert_close(gradient[:, :4], -2 * noise / 4)  # of the squared error alone
    assert (gradient[:, 4:].abs() > 0).any()


def test_a_new_head_predicts_the_noisiest_tokens_noise():
    torch.manual_seed(0)
    model = create_model("mar_tiny")
    x = torch.randn(1000, model.token_dim, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        eps = model.diffloss.net(x, torch.full((1000,), 999), torch.randn(1000, 128)).chunk(2, dim=1)[0]
    assert (eps - x).std() < 0.02


CLIP = torch.nn.utils.clip_grad_norm_


class Cut(BaseException):
    """Ends a training as a signal would, wherever it is."""


def cut_after(monkeypatch, steps: int) -> None:
    """Let `fit` save after each step, and cut it off in the step after so many, before the weights change."""
    left = iter(range(steps))

    def clip(*args, **kwargs):
        if next(left, None) is None:
            raise Cut
        return CLIP(*args, **kwargs)

    monkeypatch.setattr(torch.nn.utils, "clip_grad_norm_", clip)
    monkeypatch.setattr(loop, "SAVE_EVERY", 0.0)


def make_regression(steps: int, folder, **options) -> torch.nn.Module:
    torch.manual_seed(0)
    module = torch.nn.Linear(4, 1)

    def loss(generator: torch.Generator) -> torch.Tensor:
        x = torch.randn(32, 4, generator=generator)
        return (module(x) - x.sum(dim=1, keepdim=True)).square().mean()

    options = {"lr": 0.2, "warmup": 1, "device": torch.device("cpu"), **options}
    return module, lambda: fit(module, loss, folder=folder, steps=steps, **options)


@pytest.mark.parametrize("options", [{}, {"matrices": ["weight"], "lr": 1.5}], ids=["AdamW", "Muon"])
def test_a_training_that_was_cut_off_ends_like_one_that_was_not(tmp_path, monkeypatch, options):
    module, run = make_regression(40, tmp_path / "whole", **options)
    run()

    other, run_other = make_regression(40, tmp_path / "cut", **options)
    cut_after(monkeypatch, 25)
    with pytest.raises(Cut):
        run_other()
    monkeypatch.undo()
    resumed, run_resumed = make_regression(40, tmp_path / "cut", **options)
    run_resumed()
    torch.testing.assert_close(resumed.weight, module.weight, rtol=0, atol=0)
    assert not torch.equal(other.weight, module.weight)
    assert (module.weight - 1).abs().max() < 0.1


def test_a_training_begun_when_there_was_one_optimizer_goes_on(tmp_path):
    make_regression(5, tmp_path)[1]()
    state = torch.load(tmp_path / "training.pt")
    (state["optimizer"],) = state.pop("optimizers")
    del state["settings"]
    torch.save(state, tmp_path / "training.pt")
    module, run = make_regression(5, tmp_path, settings={"--seed": 0})
    run()
    torch.testing.assert_close(module.state_dict(), state["model"], rtol=0, atol=0)


@pytest.mark.parametrize(
    ("steps", "options", "named"),
    [
        (6, {"steps_flag": "--finish_steps"}, "--finish_steps 5"),
        (5, {"lr": 0.1, "lr_flag": "--context_lr"}, "--context_lr"),
        (5, {"matrices": ["weight"]}, "is not of this training"),
        (5, {"settings": {"--seed": 1, "--batch_size": 2}}, r"other settings \(--seed 0 there, 1 now\)"),
    ],
    ids=["length", "learning rate", "optimizers", "settings"],
)
def test_a_folder_of_another_training_is_refused(steps, options, named, tmp_path):
    make_regression(5, tmp_path, settings={"--seed": 0})[1]()
    with pytest.raises(InputError, match=named):
        make_regression(steps, tmp_path, **options)[1]()


def test_a_loss_that_is_not_finite_ends_training_though_it_is_the_last_steps(tmp_path):
    module = torch.nn.Linear(1, 1)

    def loss(generator: torch.Generator) -> torch.Tensor:
        return module.weight.sum() * (float("nan") if generator.initial_seed() == 3 else 1.0)

    with pytest.raises(InputError, match=r"became nan at step 3: lower --context_lr"):
        fit(module, loss, folder=tmp_path, steps=4, lr=0.1, lr_flag="--context_lr", device=torch.device("cpu"))
    assert not (tmp_path / "training.pt").exists()


def test_reports_come_now_and_then_and_at_the_end(tmp_path, monkeypatch):
    monkeypatch.setattr(loop, "REPORT_EVERY", 2)
    reported = []
    module, run = make_regression(5, tmp_path, report=lambda step, average: reported.append((step, average)))
    average = run()
    assert [step for step, _ in reported] == [2, 4, 5]
    assert all(reported_average is average for _, reported_average in reported)
    assert average is not module


# Muon


def test_orthogonalizing_makes_all_singular_values_alike_and_keeps_the_directions():
    torch.manual_seed(0)
    matrix = torch.randn(32, 16) @ torch.diag(torch.logspace(0, -2, 16))
    u, s, v = torch.linalg.svd(matrix, full_matrices=False)
    assert s.max() > 50 * s.min()
    in_its_directions = u.T @ orthogonalize(matrix) @ v.T
    assert in_its_directions.diagonal().min() > 0.6
    assert in_its_directions.diagonal().max() < 1.3
    assert (in_its_directions - in_its_directions.diagonal().diag()).abs().max() < 1e-4
    torch.testing.assert_close(orthogonalize(matrix.T), orthogonalize(matrix).T)


def muon_step(*gradients: torch.Tensor, **options) -> torch.Tensor:
    """Return what Muon makes of a matrix of ones after a step with each of the gradients."""
    matrix = torch.nn.Parameter(torch.ones_like(gradients[0]))
    optimizer = Muon([matrix], lr=0.1, **options)
    for gradient in gradients:
        matrix.grad = gradient
        optimizer.step()
    return matrix.detach()


def test_muon_orthogonalizes_queries_keys_and_values_apart():
    torch.manual_seed(0)
    parts = [scale * torch.randn(8, 8) for scale in (1.0, 1e-3, 1e3)]
    expected = 1 - 0.1 * 0.2 * 8**0.5 * torch.cat([orthogonalize(part) for part in parts])
    torch.testing.assert_close(muon_step(torch.cat(parts)), expected, rtol=0, atol=1e-4)
    other = torch.randn(32, 8)  # not of three matrices
    torch.testing.assert_close(muon_step(other), 1 - 0.1 * 0.2 * 32**0.5 * orthogonalize(other))


def test_muon_decays_weights_and_looks_ahead_along_the_momentum():
    torch.manual_seed(0)
    first, second = torch.randn(2, 6, 8)
    average = 0.9 * 0.1 * first + 0.1 * second
    expected = torch.ones(6, 8)
    for ahead in (first, 0.1 * second + 0.9 * average):
        expected = 0.95 * expected - 0.1 * 0.2 * 8**0.5 * orthogonalize(ahead)
    torch.testing.assert_close(muon_step(first, second, momentum=0.9, weight_decay=0.5), expected)


# The initial weights


def test_a_new_model_attends_to_neighbours():
    torch.manual_seed(0)
    model = create_model("mar_tiny")
    initialize_with_neighbours(model)
    positions = torch.arange(256)[None]
    rows = model.decoder_blocks[0].norm1(model.masked_input(positions))
    attention = model.decoder_blocks[0].attn
    queries, keys, _ = (attention.split_heads(x) for x in attention.queries_keys_values(rows))
    weights = torch.einsum("bqhd,bkhd->hqk", queries, keys).div(8).softmax(dim=-1).mean(dim=0)
    center, beside, below, far = 8 * 16 + 8, 8 * 16 + 9, 9 * 16 + 8, 1
    assert weights[center, beside] > 10 * weights[center, far]
    assert weights[center, below] > 10 * weights[center, far]


# The probe


def correlated_images(count: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Draw tokens [N, 64, 1]: 3 times the class, plus N(0, 1) for each image, plus N(0, 1/4) for each token."""
    generator = torch.Generator().manual_seed(0)
    labels = torch.arange(count) % 2
    level, noise = torch.randn(count, 1, 1, generator=generator), torch.randn(count, 64, 1, generator=generator)
    return level + 0.5 * noise + 3.0 * labels[:, None, None], labels


def test_the_best_linear_prediction_is_that_of_the_formula():
    tokens, labels = correlated_images(4000)
    errors = linear_errors(tokens[1000:], labels[1000:], tokens[:1000], labels[:1000])
    # Given k tokens, the variance of an image's level is 1 / (1 + 4 k), and that of a token's noise 1/4.
    expected = {known: (0.25 + 1 / (1 + 4 * known)) ** 0.5 for known in (0, 6, 19, 32, 48)}
    tolerance = {known: 0.02 if known else 0.1 for known in expected}  # an image has one level, but many tokens
    assert errors == {known: pytest.approx(error, rel=tolerance[known]) for known, error in expected.items()}


def test_the_best_linear_prediction_is_the_regression_on_class_and_known_tokens():
    """Fitted on the images that it is measured on, it is least squares, whose every number is known."""
    generator = torch.Generator().manual_seed(0)
    labels = torch.arange(200) % 3
    tokens = torch.randn(200, 16, generator=generator) @ torch.randn(16, 16, generator=generator)
    tokens = (tokens + 5.0 * torch.randn(3, 16, generator=generator)[labels]).unflatten(1, (8, 2))
    classes = torch.eye(3)[labels]
    expected: dict[int, list] = {known: [] for known in (0, 1, 2, 4, 6)}
    for order, image in zip(probe._random_order(tokens)[140:], range(140, 200)):
        for known, squares in expected.items():
            inputs = torch.cat([classes, tokens[:, order[:known]].flatten(1)], dim=1).double()
            targets = tokens[:, order[known:]].flatten(1).double()
            predicted = inputs[image] @ torch.linalg.lstsq(inputs, targets).solution
            squares.append((predicted - targets[image]).square().mean())
    errors = linear_errors(tokens, labels, tokens, labels)
    for known, squares in expected.items():
        assert errors[known] == pytest.approx(torch.stack(squares).mean().sqrt().item(), rel=1e-3)


class MeanOfKnown(torch.nn.Module):
    """Has a network's interface; its conditions are the class and the mean of the known tokens."""

    class_emb = torch.nn.Embedding.from_pretrained(torch.tensor([[0.0], [1.0]]))

    def forward(self, class_embedding, tokens, positions):
        mean = tokens.mean(dim=1) if tokens.shape[1] else torch.zeros_like(class_embedding)
        conditions = torch.cat([class_embedding, mean], dim=-1)[:, None]
        return conditions.expand(-1, positions.shape[1] - tokens.shape[1], -1)


def test_a_readout_of_all_that_known_tokens_tell_is_as_good_as_the_linear_prediction():
    """In these images that is their class and the mean of their known tokens."""
    tokens, labels = correlated_images(4000)
    linear = linear_errors(tokens[1000:], labels[1000:], tokens[:1000], labels[:1000])
    readout = readout_errors(MeanOfKnown(), tokens[:1000], labels[:1000])
    assert readout == {known: pytest.approx(error, rel=0.02) for known, error in linear.items()}


def test_a_readout_of_conditions_without_context_is_as_bad_with_known_tokens_as_without(monkeypatch):
    tokens, labels = correlated_images(1000)
    forward = MeanOfKnown.forward
    monkeypatch.setattr(MeanOfKnown, "forward", lambda *args: forward(*args) * torch.tensor([1.0, 0.0]))
    errors = readout_errors(MeanOfKnown(), tokens, labels)
    assert list(errors.values()) == [pytest.approx(1.25**0.5, rel=0.1)] * 5


def test_the_probe_prints_errors_and_their_ratios_as_training_goes_on(capsys):
    tokens, labels = correlated_images(500)
    measure = ContextProbe(tokens[100:], labels[100:], tokens[:100], labels[:100])
    measure("context, step 250", MeanOfKnown())
    first, second = capsys.readouterr().out.splitlines()
    assert (
        first
        == "RMS error of unknown tokens, best linear prediction: "
        + ", ".join(f"{error:.3f} at {known}" for known, error in measure.linear.items())
        + " known"
    )
    errors, ratios = second.removeprefix("context, step 250: ").split(
        " known; relative to the best linear prediction: "
    )
    for error, ratio, (known, linear) in zip(errors.split(", "), ratios.split(", "), measure.linear.items()):
        assert error.endswith(f" at {known}") and ratio.endswith(f" at {known}")
        assert float(error.split()[0]) / linear == pytest.approx(float(ratio.split()[0]), abs=2e-3)


def test_masks_are_those_of_a_random_moment_of_sampling():
    generator = torch.Generator().manual_seed(0)
    masked = np.array([train.masked_tokens(256, generator) for _ in range(4000)]) / 256
    assert masked.min() >= 1 / 256
    assert masked.max() == 1
    # mean of the cosine from 0 to a quarter turn: 2 / pi; rounding up adds half a token
    assert masked.mean() == pytest.approx(2 / np.pi + 0.5 / 256, abs=0.015)


def test_rescaling_latents_leaves_the_reconstruction():
    torch.manual_seed(0)
    vae = AutoencoderKL(embed_dim=2, ch=32, ch_mult=(1, 2), num_res_blocks=1).double().eval()
    x = torch.randn(2, 3, 16, 16, dtype=torch.float64)
    with torch.no_grad():
        before = vae.encode(x)
        image = vae.decode(before.mean)
        train.set_latent_std(vae, 2.0, 5.0)
        after = vae.encode(x)
        torch.testing.assert_close(after.mean, 2.5 * before.mean)
        torch.testing.assert_close(torch.exp(0.5 * after.logvar), 2.5 * torch.exp(0.5 * before.logvar))
        torch.testing.assert_close(vae.decode(after.mean), image)


@pytest.fixture
def tiny_data(tmp_path) -> Path:
    """A folder of 12 random images of each of two classes."""
    rng = np.random.default_rng(0)
    for name in ("cats", "dogs"):
        (tmp_path / "data" / name).mkdir(parents=True)
        for number in range(12):
            pixels = rng.integers(0, 255, (40, 50, 3), dtype=np.uint8)
            Image.fromarray(pixels).save(tmp_path / "data" / name / f"{number}.png")
    return tmp_path / "data"


@pytest.fixture
def narrow_mar_tiny(monkeypatch) -> None:
    """Make mar_tiny a network that trains in milliseconds."""
    preset = PRESETS["mar_tiny"]
    narrow = {"encoder_embed_dim": 16, "decoder_embed_dim": 16, "diffloss_w": 16, "diffloss_d": 1}
    architecture = {**preset.architecture, **narrow, "encoder_depth": 1, "decoder_depth": 1, "buffer_size": 4}
    monkeypatch.setitem(PRESETS, "mar_tiny", dataclasses.replace(preset, architecture=architecture))


def test_training_runs_from_a_folder_of_images_to_weights_that_load(tiny_data, tmp_path, monkeypatch, capsys):
    common = ["--data", str(tiny_data), "--steps", "2", "--batch_size", "2", "--device", "cpu"]
    vae, mar = tmp_path / "vae", tmp_path / "mar"
    assert train.main(["vae", *common, "--output_dir", str(vae)]) == 0
    arguments = [
        "--vae_path",
        str(vae / "vae.safetensors"),
        "--head_tokens",
        "8",
        "--context_steps",
        "2",
        "--finish_steps",
        "2",
        "--output_dir",
        str(mar),
    ]
    assert train.main(["mar", *common, *arguments]) == 0
    train.load_weights(create_model("mar_tiny"), mar, what="mar_tiny")
    printed = capsys.readouterr().out
    for when in ("best linear prediction: ", "context, step 2: ", "diffusion, step 2: ", "finish, step 2: "):
        assert when in printed

    class Read(Exception):
        pass

    def encode_images(vae, images):
        raise Read

    monkeypatch.chdir(tmp_path)  # the preset's VAE is found from anywhere
    monkeypatch.setattr(train, "encode_images", encode_images)
    with pytest.raises(Read):
        train.main(["mar", *common])


def test_a_vae_is_rescaled_by_images_of_all_classes(tiny_data, tmp_path, monkeypatch, capsys):
    seen, report = [], train.vae_report
    monkeypatch.setattr(train, "vae_report", lambda vae, images: seen.append(images) or report(vae, images))
    (tiny_data / ".cache").mkdir()  # is no class
    monkeypatch.setattr(train, "REPORT_IMAGES", 12)
    arguments = ["vae", "--data", str(tiny_data), "--output_dir", str(tmp_path / "vae"), "--steps", "1"]
    arguments += ["--batch_size", "2", "--device", "cpu"]
    assert train.main(arguments) == 0
    images, labels = train.load_images(str(tiny_data), 32, Path())
    assert labels.unique().tolist() == [0, 1]
    classes = [int(labels[(train.to_float(images) == image).flatten(1).all(dim=1)]) for image in seen[0]]
    assert len(classes) == 12 and 2 < sum(classes) < 10
    (tiny_data / "dogs" / "0.png").unlink()
    capsys.readouterr()
    assert train.main(arguments) == 2
    assert "other settings (sha256 of --data" in capsys.readouterr().err


def run_mar(data: Path, output_dir: Path, *arguments: str) -> int:
    lengths = ["--context_steps", "4", "--steps", "3", "--finish_steps", "2"]
    sizes = ["--batch_size", "2", "--head_tokens", "8", "--device", "cpu"]
    return train.main(["mar", "--data", str(data), "--output_dir", str(output_dir), *lengths, *sizes, *arguments])


@pytest.mark.parametrize("steps_at_a_time", [1, 2])
def test_mar_cut_off_again_and_again_gets_the_weights_of_one_that_was_not(
    steps_at_a_time, narrow_mar_tiny, tiny_data, tmp_path, monkeypatch
):
    """Two steps at a time cross from phase to phase in one process; one at a time begin a phase in a new one."""
    assert run_mar(tiny_data, tmp_path / "whole") == 0
    cuts = 0
    while not (tmp_path / "cut" / "checkpoint-last.safetensors").exists():
        cut_after(monkeypatch, steps_at_a_time)
        try:
            assert run_mar(tiny_data, tmp_path / "cut") == 0
        except Cut:
            cuts += 1
        monkeypatch.setattr(torch.nn.utils, "clip_grad_norm_", CLIP)
    assert cuts == 9 // steps_at_a_time - (9 % steps_at_a_time == 0)
    weights = [(tmp_path / run / "checkpoint-last.safetensors").read_bytes() for run in ("whole", "cut")]
    assert weights[0] == weights[1]
    assert run_mar(tiny_data, tmp_path / "cut") == 0  # of a run that is through
    assert (tmp_path / "cut" / "checkpoint-last.safetensors").read_bytes() == weights[0]


def test_no_step_of_a_phase_repeats_the_batch_of_another_phase(narrow_mar_tiny, tiny_data, tmp_path, monkeypatch):
    drawn, draw = [], train.draw_batch
    monkeypatch.setattr(train, "draw_batch", lambda *args: drawn.append(draw(*args)) or drawn[-1])
    assert run_mar(tiny_data, tmp_path / "run") == 0
    assert len({tuple(batch.positions.flatten().tolist()) for batch in drawn}) == len(drawn) == 9


def test_training_goes_on_from_weights_of_an_earlier_one_with_batches_of_its_own(
    narrow_mar_tiny, tiny_data, tmp_path, monkeypatch, capsys
):
    drawn, draw = [], train.draw_batch
    monkeypatch.setattr(train, "draw_batch", lambda *args: drawn.append(draw(*args)) or drawn[-1])
    first, second = tmp_path / "first", tmp_path / "second"
    assert run_mar(tiny_data, first) == 0
    assert run_mar(tiny_data, second, "--start_from", str(first), "--lr", "1e-9") == 0
    assert len({tuple(batch.positions.flatten().tolist()) for batch in drawn}) == len(drawn) == 9 + 5
    assert not (second / "context").exists()
    models = [create_model("mar_tiny") for _ in range(2)]
    loaded = [train.load_weights(model, run, what="mar_tiny") for model, run in zip(models, (first, second))]
    assert [train.steps_trained(weights) for weights in loaded] == [9, 9 + 5]
    for before, after in zip(models[0].parameters(), models[1].parameters()):
        torch.testing.assert_close(before, after, rtol=0, atol=1e-6)
    capsys.readouterr()
    assert run_mar(tiny_data, tmp_path / "third", "--start_from", str(tmp_path / "nowhere")) == 2
    assert "no weights for mar_tiny" in capsys.readouterr().err and not (tmp_path / "third").exists()
    assert run_mar(tiny_data, first, "--start_from", str(second)) == 2
    assert "leave it out" in capsys.readouterr().err
    assert run_mar(tiny_data, second, "--lr", "1e-9") == 2
    assert "give it, or take another --output_dir" in capsys.readouterr().err
    weights = (second / "checkpoint-last.safetensors").read_bytes()
    assert run_mar(tiny_data, second, "--start_from", str(second), "--lr", "1e-9") == 2
    assert "other settings (sha256 of --start_from" in capsys.readouterr().err
    assert (second / "checkpoint-last.safetensors").read_bytes() == weights


def test_a_folder_of_another_mar_is_refused(narrow_mar_tiny, tiny_data, tmp_path, capsys):
    run = tmp_path / "run"
    assert run_mar(tiny_data, run) == 0
    for arguments, named in [
        (["--context_steps", "5"], "give --context_steps 4"),
        (["--steps", "4"], "give --steps 3"),
        (["--finish_steps", "3"], "give --finish_steps 2"),
        (["--context_lr", "1"], "another --context_lr"),
        (["--lr", "1"], "another --lr"),
        (["--seed", "1"], "other settings (--seed 0 there, 1 now)"),
    ]:
        assert run_mar(tiny_data, run, *arguments) == 2
        assert named in capsys.readouterr().err
    for phase, other in [("diffusion", "context"), ("finish", "context"), ("context", "finish")]:
        kept = (run / phase / "training.pt").read_bytes()
        (run / phase / "training.pt").write_bytes((run / other / "training.pt").read_bytes())
        assert run_mar(tiny_data, run) == 2
        assert f"{phase}/training.pt is not of this training" in capsys.readouterr().err
        (run / phase / "training.pt").write_bytes(kept)
    (run / "latents.pt").write_bytes(b"damaged")  # made again
    assert run_mar(tiny_data, run) == 0
    (tiny_data / "dogs" / "0.png").unlink()
    capsys.readouterr()
    assert run_mar(tiny_data, run) == 2
    assert "latents.pt holds latents of other images" in capsys.readouterr().err


def test_data_that_does_not_fit_is_named_before_it_is_encoded(tiny_data, tmp_path, capsys, monkeypatch):
    monkeypatch.delattr(train, "encode_images")
    for name in map(str, range(9)):
        (tiny_data / name).mkdir()
        Image.new("RGB", (32, 32)).save(tiny_data / name / "0.png")
    assert run_mar(tiny_data, tmp_path / "run") == 2
    assert "has 11 classes, but mar_tiny has 10" in capsys.readouterr().err
    (tiny_data / "cats" / "0.png").write_bytes((tiny_data / "cats" / "1.png").read_bytes()[:200])
    assert run_mar(tiny_data, tmp_path / "run") == 2
    assert "cats/0.png is not a readable image" in capsys.readouterr().err
    (tmp_path / "empty" / "cats").mkdir(parents=True)
    assert run_mar(tmp_path / "empty", tmp_path / "run") == 2
    assert "no images in its subfolders" in capsys.readouterr().err
    (tmp_path / "file").touch()
    assert run_mar(tiny_data, tmp_path / "file" / "run") == 2
    assert "file is not a folder" in capsys.readouterr().err
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        (["vae", "--data", "nowhere"], "--data nowhere"),
        (["vae", "--steps", "0"], "--steps"),
        (["mar", "--context_steps", "0"], "--context_steps must be at least 1"),
        (["mar", "--finish_steps", "-1"], "--finish_steps must be at least 1"),
        (["mar", "--head_tokens", "0"], "--head_tokens must be at least 1"),
        (["mar", "--context_lr", "0"], "--context_lr must be a finite number above 0"),
        (["mar", "--lr", "inf"], "--lr must be a finite number above 0"),
        (["mar", "--posterior_noise", "1.5"], "--posterior_noise must be 0 to 1"),
        (["mar", "--posterior_noise", "nan"], "--posterior_noise must be 0 to 1"),
        (["mar", "--seed", "-1"], "--seed must be"),
        (["mar", "--data", "nowhere"], "--data nowhere"),
        (["classifier", "--data", "elsewhere"], "--data elsewhere"),
        (["vae", "--fashion_mnist", "nowhere"], "nowhere/train-images-idx3-ubyte.gz does not exist"),
        (["mar", "--fashion_mnist", "nowhere"], "with --fashion_mnist"),
        (["classifier", "--fashion_mnist", "nowhere"], "nowhere/t10k-images-idx3-ubyte.gz does not exist"),
    ],
)
def test_bad_input_is_named_and_exits_with_2(arguments, named, capsys):
    assert train.main([*arguments, "--device", "cpu"]) == 2
    assert named in capsys.readouterr().err


@pytest.mark.parametrize("content", [b"", b"no checkpoint", b"PK\x03\x04 cut off"], ids=["empty", "other", "truncated"])
def test_a_damaged_checkpoint_is_named(content: bytes, tmp_path):
    (tmp_path / "training.pt").write_bytes(content)
    with pytest.raises(InputError, match=r"training\.pt is not of this training"):
        fit(torch.nn.Linear(1, 1), None, folder=tmp_path, steps=1, lr=0.1, device=torch.device("cpu"))
