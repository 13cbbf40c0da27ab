"""DiffusionSfM's model, schedule, loss and sampler against numbers recorded from the released code."""

from __future__ import annotations

import gzip
import json

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor

from diffusionsfm_cases import ndc, recorded_model, unit_rays
from parity_tools import PARITY_DIR, TOLERANCE, fill_, image, imagenet_image, load_case, normal, relative_error
from restrike import geometry as g
from restrike.losses import ray_loss
from restrike.models import build
from restrike.models.diffusionsfm import ImageFeatures, NoiseSchedule, load_images, sample_rays
from restrike.models.diffusionsfm.embeddings import PositionTables, timestep_features
from restrike.models.diffusionsfm.sampler import unit_vectors
from restrike.models.diffusionsfm.transformer import RayTransformer

TIGHT = 1e-6
KEYS = json.loads(gzip.decompress((PARITY_DIR / "diffusionsfm" / "keys.json.gz").read_bytes()))


def check(want: dict[str, np.ndarray], tolerance: float, **got: Tensor) -> None:
    errors = {name: relative_error(value, want[name]) for name, value in got.items()}
    assert all(error <= tolerance for error in errors.values()), errors


SCHEDULES = ["default", "cosine", "scaled_linear", "constructor_defaults"]


@pytest.mark.parametrize("name", SCHEDULES)
def test_noise_schedules(name):
    meta, want = load_case("diffusionsfm", f"schedule_{name}")
    schedule = NoiseSchedule(**meta["constructor"])
    check(want, TIGHT, betas=schedule.betas, alphas=schedule.alphas, alphas_cumprod=schedule.alphas_cumprod)
    for key in (key for key in want if key.startswith("timesteps_")):
        assert schedule.inference_timesteps(int(key.split("_")[1])) == want[key].astype(int).tolist()
    assert name != "default" or schedule.alphas_cumprod[-1] == 0


def test_noising():
    meta, want = load_case("diffusionsfm", "add_noise")
    schedule = NoiseSchedule(**meta["constructor"])
    clean, predicted = (unit_rays(f"dsfm.add.{name}", 4, 2, 16, 16) for name in ("x0", "pred"))
    mask = (normal("dsfm.add.mask", 4, 2, 16, 16) > -0.8).float()
    times = torch.tensor(meta["inputs"]["t"])
    noisy = schedule.add_noise(clean, normal("dsfm.add.eps", 4, 2, 8, 16, 16), times)
    noise = schedule.implied_noise(noisy, predicted, times)
    check(want, TOLERANCE, x_t=noisy * mask[:, :, None], x_t_nomask=noisy, eps_from_x0=noise)


def test_sinusoids_of_positions_and_times():
    _, want = load_case("diffusionsfm", "position_tables")
    tables = PositionTables(8, 256, 1152)
    got = {"image_pos_table": tables.image_pos_table, "token_pos_table": tables.token_pos_table}
    check(want, TIGHT, **got, t_features=timestep_features(torch.arange(100)))


@torch.no_grad()
def test_the_transformer_alone():
    meta, want = load_case("diffusionsfm", "dit_tiny")
    options = {name: value for name, value in meta["constructor"].items() if name != "patch"}
    model = fill_(RayTransformer(**options), rename="ray_predictor.{}".format).eval()
    x, times = normal("dsfm.dit.x", 2, 3, 20, 4, 4), torch.tensor(meta["inputs"]["t"])
    _, maps = model.forward_features(x, times, taps=(3, 7))
    got = {"out": model(x, times), "out_single_t": model(x, times[:1]), "act_0": maps[0], "act_1": maps[1]}
    model.attend_within_views = True
    check(want, TOLERANCE, **got, out_within=model(x, times))


def test_the_sparse_loss_and_its_gradients():
    meta, want = load_case("diffusionsfm", "sparse_tiny_loss")
    model = recorded_model(meta)
    features, coords = ImageFeatures(normal("dsfm.st.feat", 2, 3, 384, 4, 4)), ndc(meta["inputs"]["crop"], 4)
    coords = coords.expand(2, -1, -1, -1, -1)
    clean, mask = unit_rays("dsfm.st.x0", 2, 3, 4, 4), (normal("dsfm.st.mask", 2, 3, 4, 4) > -0.8).float()
    times = torch.tensor(meta["inputs"]["t"])
    noisy = model.noise_scheduler.add_noise(clean, normal("dsfm.st.eps", 2, 3, 8, 4, 4), times) * mask[:, :, None]
    predicted = model.denoise(features, noisy, coords, times, mask)
    loss = ray_loss(predicted, clean, mask)
    loss.backward()
    gradients = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    norm = torch.stack([x.norm() for x in gradients.values()]).norm()
    with torch.no_grad():
        whole = model.denoise(features, noisy, coords, times[:1])
    check(
        want,
        TOLERANCE,
        x_t=noisy,
        pred=predicted,
        loss=loss,
        grad_norm=norm,
        pred_ones=whole,
        grad_input_conv=gradients["scratch.input_conv.weight"],
        grad_qkv=gradients["ray_predictor.blocks.0.attn.qkv.weight"],
        grad_adaLN=gradients["ray_predictor.blocks.1.adaLN_modulation.1.weight"],
        grad_final=gradients["ray_predictor.final_layer.linear.weight"],
    )


def end_to_end(name: str, seed: str) -> None:
    """Images, cameras and depth -> target -> noised -> prediction -> loss."""
    meta, want = load_case("diffusionsfm", name)
    model = recorded_model(meta)
    is_dense = meta["constructor"]["model"] == "dense"
    size = 256 if is_dense else 16
    given = {k: torch.from_numpy(v).reshape(meta["shapes"][k]) for k, v in want.items() if k.startswith("in_")}
    depth = 3 + 1.5 * image(f"{seed}.depth", 2, 3, size, size)[:, 0]
    if not is_dense:
        depth = 3.5 + 0.3 * normal(f"{seed}.depth", 2, size, size)
    intrinsics = g.make_intrinsics(given["in_focal"], given["in_pp"])
    coords = g.patch_centers(given["in_crop"], size)
    cameras = g.make_se3(given["in_R"].mT, given["in_T"])
    scene = g.normalize_to_first_view_median(cameras, depth, intrinsics, coords)
    rays = g.ray_origins_and_endpoints(coords, scene.depth, intrinsics, scene.world_to_camera)
    clean = g.encode_rays(*rays)[None]
    mask = (normal(f"{seed}.mask", 1, 2, size, size) > -1.0).float()
    times = torch.tensor(meta["inputs"]["t"])
    noise = normal(f"{seed}.eps", 1, 2, 8, size, size)
    noisy = model.noise_scheduler.add_noise(clean, noise, times) * mask[:, :, None]
    images = imagenet_image(f"{seed}.img", 1, 2, 3, 224, 224)
    with torch.no_grad():
        predicted = model(images, noisy, ndc(given["in_crop"], 16), times, mask)
    check(want, TOLERANCE, x0=clean, x_t=noisy, pred=predicted, loss=ray_loss(predicted, clean, mask))
    if is_dense:
        check(want, TOLERANCE, **stages(model, images, noisy, ndc(given["in_crop"], 16), times, mask))


@torch.no_grad()
def stages(
    model: torch.nn.Module, images: Tensor, noisy: Tensor, coords: Tensor, times: Tensor, mask: Tensor
) -> dict[str, Tensor]:
    """What the decoder makes on its way."""
    decoder, encoder, got = model.scratch, model.feature_extractor.model, {}
    features = model.encode(images)
    _, taps = encoder.forward_features(images.flatten(0, 1), model.encoder_taps)
    maps = [p(tap).mT.unflatten(-1, (16, 16)) for p, tap in zip(model.project_opers, taps, strict=True)]
    x = torch.cat([features.patches, model._embed(torch.cat([noisy, mask[:, :, None]], 2)), coords], dim=2)
    _, rays = model.ray_predictor.forward_features(x, times, model.taps)
    for i, (level, factor) in enumerate(zip([*maps, *rays], (8, 4, 2, 1), strict=True), 1):
        got[f"layer{i}_rn"] = decoder.level(i, level, factor)
    timed = decoder.modulations(times)
    skips = [skip.flatten(0, 1) for skip in features.skips]
    got |= {f"refinenet{i}": x for i, x in zip((4, 3, 2, 1), decoder.stages(skips, rays, timed), strict=True)}
    return got


def test_the_dense_model_from_images_to_loss():
    end_to_end("dense_tiny_loss", "dsfm.dt")


@pytest.mark.slow
@pytest.mark.parametrize(("name", "seed"), [("sparse_full_loss", "dsfm.sf"), ("dense_full_loss", "dsfm.df")])
def test_the_full_models_from_images_to_loss(name, seed):
    end_to_end(name, seed)


@pytest.mark.parametrize("name", ["ddim_tiny", "ddim_tiny_stop90", "ddim_tiny_20steps"])
def test_sampling(name):
    meta, want = load_case("diffusionsfm", name)
    options, views = meta["inputs"], meta["shapes"]["final"][1]
    seed = "dsfm.ddim2" if name == "ddim_tiny_20steps" else "dsfm.ddim"
    steps = options["num_inference_steps"]
    samples = sample_rays(
        recorded_model(meta),
        ndc(options["crop"], 4),
        features=ImageFeatures(normal(f"{seed}.feat", 1, views, 384, 4, 4)),
        noise=normal(f"{seed}.xT", 1, views, 8, 4, 4),
        num_steps=steps,
        num_calls=steps if options["stop_iteration"] is None else steps - options["stop_iteration"] + 1,
        keep_predictions=range(steps),
        keep_states=range(steps + 1),
    )
    got = {key: samples.predictions[int(key[5:])] for key in want if key.startswith("pred_")}
    got |= {key: samples.states[int(key[2:])] for key in want if key.startswith("x_")}
    check(want, TOLERANCE, **got, final=samples.state)
    assert len(samples.predictions) == (11 if name == "ddim_tiny_stop90" else steps)


def test_sampling_of_more_views_than_fit_in_one_call():
    meta, want = load_case("diffusionsfm", "ddim_dense_many_views")
    steps = meta["inputs"]["num_inference_steps"]
    samples = sample_rays(
        recorded_model(meta),
        ndc(meta["inputs"]["crop"], 16),
        imagenet_image("dsfm.dm.img", 1, 5, 3, 224, 224),
        noise=normal("dsfm.dm.xT", 1, 5, 8, 256, 256),
        num_steps=steps,
        num_calls=steps,
        views_per_call=meta["inputs"]["max_views_per_call"],
        keep_predictions=(0,),
    )
    check(want, TOLERANCE, pred_0=samples.predictions[0], pred_last=samples.prediction, final=samples.state)
    assert torch.allclose(unit_vectors(samples.prediction), samples.prediction, atol=1e-6)


def test_preprocessing_of_image_files(tmp_path):
    meta, want = load_case("diffusionsfm", "demo_preprocess")
    files = []
    for i, (width, height) in enumerate(meta["constructor"]["sizes_WH"]):
        pixels = (255 * image(f"dsfm.demo.{i}", 3, height, width)).round().byte().permute(1, 2, 0).numpy()
        files.append(tmp_path / f"{i}.png")
        Image.fromarray(pixels).save(files[-1])
    loaded = load_images(files)
    released = g.crop_parameters(loaded.crop_boxes, loaded.released_sizes())
    check(want, 1e-5, image=loaded.images, crop_parameters=released)
    ours = g.crop_parameters(loaded.crop_boxes, loaded.source_sizes)
    assert ours[:, :2].abs().max() == 0  # a centred crop's centre is the picture's
    assert (released[:, :2].abs().amax(1) > 0.3).tolist() == [True, True, False]


@pytest.mark.parametrize("name", KEYS)
def test_names_and_shapes_of_all_parameters_and_buffers(name):
    with torch.device("meta"):
        model = build(f"diffusionsfm_{name}")
    parameters = dict(model.named_parameters())
    got = [[n, list(t.shape), "param" if n in parameters else "buffer"] for n, t in model.state_dict().items()]
    assert got == KEYS[name]
