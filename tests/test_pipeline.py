"""`MARPipeline`: the images of eval.py, inpainting, and one sentence for each mistake."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from ranks import make_weights

import eval as program
from models import PRESETS, MARPipeline, count_flops
from util.images import encode_png
from util.options import parse_options
from util.processes import launch

pytestmark = pytest.mark.usefixtures("one_thread")
QUICK = {"progress": False, "num_iter": 6, "num_sampling_steps": 4}
PICTURE = np.random.default_rng(0).integers(0, 256, (32, 32, 3), dtype=np.uint8)
RIGHT = np.zeros((32, 32), dtype=np.uint8)
RIGHT[3:30, 17:] = 255


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """Random weights of mar_tiny."""
    path = tmp_path_factory.mktemp("weights")
    make_weights(path)
    return path


@pytest.fixture(scope="module")
def pipe(folder) -> MARPipeline:
    vae_path = folder / "vae.safetensors"
    return MARPipeline.from_pretrained(folder, preset="mar_tiny", vae_path=vae_path, dtype=torch.float32)


# From labels to images


@pytest.mark.parametrize("method", ["lazymar", "fast"])
def test_the_pngs_are_those_of_eval(method, folder, pipe, tmp_path):
    settings = {} if method == "fast" else {"num_iter": 6, "num_sampling_steps": 4}
    shorter = [f"--{name}={value}" for name, value in settings.items()]
    flags = f"--model mar_tiny --num_images 4 --eval_bsz 2 --class_labels 7,2 --method {method} --seed 3"
    flags += f" --dtype float32 --resume {folder} --vae_path {folder / 'vae.safetensors'} --no-score"
    flags += f" --output_dir {tmp_path / 'run'}"
    assert launch(lambda job: program.evaluate(job, parse_options([*flags.split(), *shorter])) and 0) == 0
    images = pipe([7, 2], method=method, seed=3, image_numbers=[2, 3], progress=False, **settings).images
    for number, image in zip([2, 3], images):
        assert encode_png(np.array(image)) == (tmp_path / "run" / "images" / f"{number:06d}.png").read_bytes()


def test_output_types_agree(pipe):
    outputs = {kind: pipe([7, 2], output_type=kind, **QUICK).images for kind in ("pil", "np", "pt", "latent")}
    assert outputs["np"].shape == (2, 32, 32, 3) and outputs["latent"].shape == (2, 2, 16, 16)
    assert np.array_equal(outputs["np"], outputs["pt"].permute(0, 2, 3, 1).numpy())
    assert np.array_equal(np.stack(outputs["pil"]), (outputs["np"] * 255).round().astype(np.uint8))
    assert torch.equal((pipe.decode(outputs["latent"]) / 2 + 0.5).clamp(0, 1), outputs["pt"])
    several = pipe([7, 2], num_images_per_label=2, output_type="latent", **QUICK).images
    assert torch.equal(several, pipe([7, 7, 2, 2], output_type="latent", **QUICK).images)
    assert torch.equal(pipe(7, output_type="latent", **QUICK).images, pipe([7], output_type="latent", **QUICK).images)


def test_the_same_call_again_is_warm(pipe):
    first = pipe([7, 2], method="lazymar", **QUICK)
    sampler = pipe.sampler(first.plan)
    assert sampler.is_warm(2)
    second = pipe([7, 2], method="lazymar", seed=1, **QUICK)
    assert pipe.sampler(first.plan) is sampler and second.images[0] != first.images[0]
    assert second.flops == count_flops(pipe.model, "lazymar", cfg=5.0, num_iter=6, num_sampling_steps=4)
    pipe([7, 2], method="mar", **QUICK)
    assert pipe.sampler(first.plan) is not sampler


def test_the_guidance_is_the_presets_by_default(pipe):
    preset = replace(pipe.preset, cfg=2.0, cfg_schedule="constant")  # as eMIGM's are
    plan = MARPipeline(pipe.model, pipe.vae, preset)(7, **QUICK).plan
    assert [step.cfg for step in plan] == [2.0] * 6


def test_a_callback_sees_tokens_become_known_and_can_end_the_call(pipe):
    seen, settings = [], {"image": PICTURE, "mask_image": RIGHT, "output_type": "latent", **QUICK}

    def look(pipe, index, step, tensors):
        assert index == len(seen) and tensors["known"].sum(dim=1).tolist() == [step.stop, step.stop]
        assert (pipe.model.patchify(tensors["latents"])[~tensors["known"]] == 0).all()
        seen.append(tensors["latents"])

    made = pipe([7, 2], callback_on_step_end=look, **settings).images
    assert len(seen) == 6 and torch.equal(seen[-1], made)

    def stop(pipe, index, step, tensors):
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        pipe([7, 2], callback_on_step_end=stop, **settings)
    assert torch.equal(pipe([7, 2], **settings).images, made), "the next call is not disturbed"


# Inpainting


@pytest.mark.parametrize("method", ["lazymar", "fast"])
def test_pixels_outside_the_mask_are_the_originals(pipe, method):
    settings = {"progress": False} if method == "fast" else QUICK
    out = pipe([7, 2], image=Image.fromarray(PICTURE), mask_image=Image.fromarray(RIGHT), method=method, **settings)
    for image in out.images:
        assert np.array_equal(np.array(image)[RIGHT == 0], PICTURE[RIGHT == 0])
        assert (np.array(image)[RIGHT > 0] != PICTURE[RIGHT > 0]).mean() > 0.5
    assert out.images[0] != out.images[1]
    # 14 x 8 tokens of 2 x 2 pixels are touched.
    assert out.plan.steps[0].start == 256 - 14 * 8 and out.plan.steps[-1].stop == 256


def test_known_tokens_are_encoded_by_the_vae(pipe):
    tensor = torch.from_numpy(PICTURE).permute(2, 0, 1) / 255
    latents = pipe([7], image=tensor, mask_image=RIGHT, output_type="latent", **QUICK).images
    expected = pipe.vae.encode(2 * tensor[None] - 1) * PRESETS["mar_tiny"].latent_scale
    torch.testing.assert_close(latents[..., :8], expected[..., :8], rtol=1e-4, atol=1e-4)
    assert (latents[..., 1:15, 8:] - expected[..., 1:15, 8:]).abs().mean() > 0.01


def test_images_and_masks_come_in_many_forms(pipe):
    expected = pipe([7, 2], image=PICTURE, mask_image=RIGHT, **QUICK).images
    tensor = torch.from_numpy(PICTURE).permute(2, 0, 1)
    images = [PICTURE / 255, tensor, Image.fromarray(PICTURE), [PICTURE, tensor]]
    masks = [RIGHT > 0, RIGHT / 255, torch.from_numpy(RIGHT)]
    for image, mask in [*((image, RIGHT) for image in images), *((PICTURE, mask) for mask in masks)]:
        assert pipe([7, 2], image=image, mask_image=mask, **QUICK).images == expected
    several = [PICTURE, PICTURE[::-1]]
    images = pipe([7, 2], image=several, mask_image=RIGHT, num_images_per_label=2, **QUICK).images
    for image, original in zip(images, [several[0], several[0], several[1], several[1]]):
        assert np.array_equal(np.array(image)[RIGHT == 0], original[RIGHT == 0])


# Bad input

BAD_CALLS = [
    ("class_labels must be from 0 to 9", {"labels": [7, 10]}),
    ("class_labels must be a LongTensor", {"labels": [0.5]}),
    ("labels, num_images_per_label and image_numbers", {"num_images_per_label": 0}),
    ("method 'foo' is unknown", {"method": "foo"}),
    ("cfg must be a finite number of at least 1", {"cfg": 0.5}),
    ("output_type must be one of pil, np, pt, latent, not 'jpg'", {"output_type": "jpg"}),
    ("must make equally many images", {"image_numbers": [0, 1]}),
    ("image and mask_image must be given together", {"mask_image": None}),
    ("image must be 32 x 32 pixels, the model's image size", {"image": PICTURE[:30, :28]}),
    ("image must be 32 x 32 pixels", {"image": PICTURE[..., 0]}),
    ("image must be one for all labels, or a list of one for each", {"image": [PICTURE, PICTURE]}),
    ("integers from 0 to 255, or floats from 0 to 1", {"image": PICTURE.astype(float)}),
    ("mask_image must be 32 x 32 pixels", {"mask_image": PICTURE}),
    ("mask_image must be white where", {"mask_image": np.zeros((32, 32))}),
    ("leave some tokens out", {"mask_image": np.ones((32, 32))}),
]


@pytest.mark.parametrize(("said", "changes"), BAD_CALLS, ids=[said for said, _ in BAD_CALLS])
def test_bad_calls_are_one_sentence(pipe, said, changes):
    with pytest.raises(ValueError, match=said) as caught:
        pipe(**{"labels": [7], "image": PICTURE, "mask_image": RIGHT, **QUICK, **changes})
    assert "\n" not in str(caught.value)


def test_weights_that_are_not_there_are_one_sentence():
    with pytest.raises(ValueError, match="unknown preset 'mar_giant': choose from mar_base"):
        MARPipeline.from_pretrained("mar_giant")
    with pytest.raises(ValueError, match=r"no weights for mar_tiny: nowhere\.pth does not exist"):
        MARPipeline.from_pretrained("nowhere.pth", preset="mar_tiny")


def test_latents_that_are_not_finite_are_refused(pipe, monkeypatch):
    monkeypatch.setattr("models.Sampler.__call__", lambda *_: torch.full((1, 2, 16, 16), torch.nan))
    with pytest.raises(ValueError, match="not finite"):
        pipe([7], **QUICK)
