"""The method against the reference's results, the worked fixture of the spec, and its plain twin."""

import copy
import math
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file

from core.engine import update
from core.optim import OptimConfig, adamw, decay_groups
from core.task import Place
from core.vit import ViTConfig, gather_patches
from pretrain.data import PretrainBatch
from pretrain.mae import DecoderConfig, MaskedAutoencoder, num_kept, random_masking, reconstruction_target
from pretrain.rc_mae import Method, RCMAETask, TeacherConfig, ema_update, hidden_patch_loss
from tests.golden_files import require
from tools.plain_step import PlainMAE, plain_ema, plain_losses, plain_optimizer, plain_step
from tools.verify.golden import FOLDER
from tools.verify.pretraining import losses_of, schedules
from tools.verify.pretraining import step as worked_step

TRUE = torch.tensor(True)


def method(**changes: object) -> Method:
    values: dict = {
        "mask_ratio": 0.75, "norm_pix_loss": True, "gamma": 1.0, "momentum": 0.996, "teacher": TeacherConfig(),
        "total_steps": 100, "mean": (0.5, 0.4, 0.3), "std": (0.2, 0.3, 0.4),
    }  # fmt: skip
    return Method(**{**values, **changes})


@pytest.mark.parametrize("name", ["rcmae_step_normpix", "rcmae_step_rawpix"])
def test_one_step_equals_the_reference_implementation(shared: Path, name: str) -> None:
    path = shared / "golden" / f"{name}.safetensors"
    golden = load_file(path)
    with safe_open(path, "pt") as file:
        facts = file.metadata()
    vit = ViTConfig(img_size=(64, 64), patch_size=16, embed_dim=48, depth=2, num_heads=3)
    decoder = DecoderConfig(embed_dim=32, depth=2, num_heads=4)
    networks = {}
    for branch in ("student", "teacher"):
        networks[branch] = MaskedAutoencoder(vit, decoder)
        prefix = f"{branch}_before."
        networks[branch].load_state_dict({k.removeprefix(prefix): v for k, v in golden.items() if k.startswith(prefix)})
    student, teacher = networks["student"], networks["teacher"]
    ids = golden["ids_shuffle"]
    hidden = ids[:, 4:]
    assert torch.equal(golden["mask"], torch.ones(4, 16).scatter(1, ids[:, :4], 0.0))

    norm_pix = facts["norm_pix"] == "true"
    reconstruction, consistency, prediction, expected = losses_of(student, teacher, golden["image"], ids, norm_pix)
    total = reconstruction + float(facts["gamma"]) * consistency
    for value, key in ((reconstruction, "reconstruction"), (consistency, "consistency"), (total, "total")):
        torch.testing.assert_close(value, golden[f"loss.{key}"].squeeze(), atol=1e-5, rtol=0)
    torch.testing.assert_close(prediction, gather_patches(golden["student_pred"], hidden), atol=1e-5, rtol=0)
    torch.testing.assert_close(expected, gather_patches(golden["teacher_pred"], hidden), atol=1e-5, rtol=0)

    total.backward()
    trainable = {n: p for n, p in student.named_parameters() if p.requires_grad}
    assert {f"grad.{n}" for n in trainable} == {k for k in golden if k.startswith("grad.")}
    for n, p in trainable.items():
        torch.testing.assert_close(p.grad, golden[f"grad.{n}"], atol=1e-6, rtol=0, msg=lambda m, n=n: f"{n}: {m}")
    decided = {n: golden[f"grad.{n}"].abs() >= 1e-7 for n in trainable}  # below, AdamW's first step is rounding

    optimizer = adamw(decay_groups(student.named_parameters(), 0.05), OptimConfig())
    for group in optimizer.param_groups:
        group["lr"] = float(facts["lr"])
    update(optimizer, TRUE)
    with torch.no_grad():
        ema_update(list(teacher.parameters()), list(student.parameters()), float(facts["momentum"]), TRUE)
    for branch, network in networks.items():
        for n, p in network.named_parameters():
            good = decided.get(n, torch.ones_like(p, dtype=torch.bool))
            wanted = golden[f"{branch}_after.{n}"]
            torch.testing.assert_close(
                p[good], wanted[good], atol=1e-4, rtol=0, msg=lambda m, n=f"{branch} {n}": f"{n}: {m}"
            )
            moved = (wanted - golden[f"{branch}_before.{n}"]).abs().max()
            assert p.requires_grad is False or moved > 1e-4 * (branch == "student"), f"{n}: the reference did not move"


def test_worked_fixture() -> None:
    """Spec section 9, in float64: masking, predictions, losses, gradients, AdamW, teacher, second forward."""
    require(worked_step())


# ---- fast path against plain twin ----------------------------------------------------------------------------------


def random_pair(vit: ViTConfig, decoder: DecoderConfig, seed: int) -> tuple[MaskedAutoencoder, PlainMAE]:
    fast = MaskedAutoencoder(vit, decoder).double()
    generator = torch.Generator().manual_seed(seed)
    fast.init_weights(generator)
    with torch.no_grad():
        for p in fast.parameters():
            if p.requires_grad:
                p.add_(0.1 * torch.randn(p.shape, generator=generator, dtype=torch.float64))
    plain = PlainMAE(vit, decoder).double()
    plain.load_state_dict(fast.state_dict())
    return fast, plain


@pytest.mark.parametrize(
    ("img_size", "in_chans", "norm_pix"), [((32, 32), 3, True), ((32, 48), 3, False), ((48, 16), 1, True)]
)
def test_fast_path_equals_plain_twin_over_three_steps(img_size: tuple[int, int], in_chans: int, norm_pix: bool) -> None:
    vit = ViTConfig(img_size=img_size, patch_size=8, in_chans=in_chans, embed_dim=24, depth=2, num_heads=3)
    decoder = DecoderConfig(embed_dim=16, depth=2, num_heads=2)
    (fast, plain), (fast_teacher, plain_teacher) = random_pair(vit, decoder, 0), random_pair(vit, decoder, 1)
    fast_optimizer = adamw(decay_groups(fast.named_parameters(), 0.05), OptimConfig())
    plain_opt = plain_optimizer(plain, lr=1e-2, weight_decay=0.05)
    for group in fast_optimizer.param_groups:
        group["lr"] = 1e-2
    generator = torch.Generator().manual_seed(2)
    for _ in range(3):
        images = torch.randn(4, in_chans, *img_size, dtype=torch.float64, generator=generator)
        ids = torch.rand(4, vit.num_patches, generator=generator).argsort(dim=1)
        ours = losses_of(fast, fast_teacher, images, ids, norm_pix)[:2]
        theirs = plain_losses(plain, plain_teacher, images, ids, 0.75, norm_pix)
        for a, b in zip(ours, theirs, strict=True):
            torch.testing.assert_close(a, b, atol=1e-12, rtol=1e-12)
        (ours[0] + 0.7 * ours[1]).backward()
        (theirs[0] + 0.7 * theirs[1]).backward()
        for (name, a), b in zip(fast.named_parameters(), plain.parameters(), strict=True):
            if a.requires_grad:
                torch.testing.assert_close(a.grad, b.grad, atol=1e-12, rtol=1e-10, msg=lambda m, n=name: f"{n}: {m}")
                # Key biases have no gradient but rounding, which AdamW's first step would blow up: follow the twin.
                a.grad.copy_(b.grad)
        update(fast_optimizer, TRUE)
        plain_opt.step()
        plain_opt.zero_grad()
        with torch.no_grad():
            ema_update(list(fast_teacher.parameters()), list(fast.parameters()), 0.9, TRUE)
        plain_ema(plain_teacher, plain, 0.9)
        for a, b in zip(fast.parameters(), plain.parameters(), strict=True):
            torch.testing.assert_close(a, b, atol=1e-12, rtol=1e-12)
        for a, b in zip(fast_teacher.parameters(), plain_teacher.parameters(), strict=True):
            torch.testing.assert_close(a, b, atol=1e-12, rtol=1e-12)


def test_the_whole_plain_step_learns_follows_and_stops_at_what_is_not_finite() -> None:
    vit = ViTConfig(img_size=(16, 16), patch_size=4, embed_dim=16, depth=1, num_heads=2)
    _, student = random_pair(vit, DecoderConfig(embed_dim=8, depth=1, num_heads=2), 0)
    teacher = copy.deepcopy(student)
    optimizer, scaler = plain_optimizer(student, lr=1e-2, weight_decay=0.05), torch.amp.GradScaler("cpu", enabled=False)
    images = torch.rand(8, 3, 16, 16, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    torch.manual_seed(0)
    figures = [plain_step(student, teacher, optimizer, scaler, images, gamma=0.5, momentum=0.5) for _ in range(12)]
    for row in figures:
        assert row["loss"] == pytest.approx(row["reconstruction"] + 0.5 * row["consistency"])
    assert figures[0]["consistency"] == 0.0 and figures[-1]["reconstruction"] < 0.95 * figures[0]["reconstruction"]
    distance = [(s - t).abs().max().item() for s, t in zip(student.parameters(), teacher.parameters(), strict=True)]
    assert 0 < max(distance) < 0.1
    with pytest.raises(ArithmeticError, match="loss is nan"):
        plain_step(student, teacher, optimizer, scaler, images * float("nan"))


# ---- masking, target, teacher ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("patches", "ratio", "kept"),
    [(196, 0.75, 49), (196, 0.5, 98), (196, 0.6, 78), (196, 0.8, 39), (196, 0.9, 19), (256, 0.75, 64)],
)
def test_number_of_kept_patches(patches: int, ratio: float, kept: int) -> None:
    assert num_kept(patches, ratio) == kept
    ids_keep, ids_hidden = random_masking(torch.rand(3, patches), ratio)
    assert ids_keep.shape == (3, kept)
    assert torch.equal(torch.cat([ids_keep, ids_hidden], 1).sort(dim=1).values, torch.arange(patches).expand(3, -1))


def test_the_smallest_noise_is_kept() -> None:
    noise = torch.rand(5, 64)
    ids_keep, ids_hidden = random_masking(noise, 0.75)
    assert noise.gather(1, ids_keep).max(dim=1).values.lt(noise.gather(1, ids_hidden).min(dim=1).values).all()


def test_target_of_a_constant_patch_is_zero_and_variance_is_unbiased() -> None:
    patches = torch.full((1, 1, 12), 3.0)
    assert torch.equal(reconstruction_target(patches, True), torch.zeros(1, 1, 12))
    values = torch.arange(4.0).view(1, 1, 4)  # mean 1.5, sum of squares 5, unbiased variance 5/3
    torch.testing.assert_close(reconstruction_target(values, True), (values - 1.5) / math.sqrt(5 / 3 + 1e-6))


def small_task(teacher: TeacherConfig | None = None, **changes: object) -> RCMAETask:
    vit = ViTConfig(img_size=(16, 16), patch_size=4, embed_dim=16, depth=2, num_heads=2)
    networks = [MaskedAutoencoder(vit, DecoderConfig(embed_dim=8, depth=1, num_heads=2)).double() for _ in range(2)]
    networks[0].init_weights(torch.Generator().manual_seed(0))
    return RCMAETask(networks[0], networks[1], method(teacher=teacher or TeacherConfig(), **changes))


def small_batch(seed: int, size: int = 8, own_noise: bool = False) -> PretrainBatch:
    g = torch.Generator().manual_seed(seed)
    images = torch.randint(0, 256, (size, 3, 16, 16), dtype=torch.uint8, generator=g)
    noise, other = torch.rand(size, 16, generator=g), torch.rand(size, 16, generator=g)
    sizes, valid = torch.full((size, 2), 16), torch.ones(size, dtype=torch.bool)
    return PretrainBatch(images, sizes, valid, noise, other if own_noise else None)


def train(task: RCMAETask, steps: int, accumulation: int, record: list) -> None:
    optimizer = adamw(decay_groups(task.named_parameters(), 0.05), OptimConfig())
    for step in range(steps):
        for group in optimizer.param_groups:
            group["lr"] = 1e-2
        for micro in range(accumulation):
            record.append([p.detach().clone() for p in task.student.parameters()])
            losses = task.losses(small_batch(step * accumulation + micro), Place(step, micro, micro))
            (sum(losses.values()) / accumulation).backward()
        update(optimizer, TRUE)
        task.after_update(step, TRUE)
    record.append([p.detach().clone() for p in task.student.parameters()])


@pytest.mark.parametrize("accumulation", [1, 2])
def test_teacher_lag_is_the_weighted_sum_of_applied_updates(accumulation: int) -> None:
    """Identity I1 of spec section 8, its last variant: any optimizer, here the real one with weight decay."""
    task, record, m = small_task(momentum=0.9), [], 0.9
    train(task, 6, accumulation, record)
    students = record[::accumulation]
    for i, (t, s) in enumerate(zip(task.teacher.parameters(), task.student.parameters(), strict=True)):
        lag = sum(m ** (6 - k) * (students[k][i] - students[k + 1][i]) for k in range(6))
        torch.testing.assert_close(s - t, -lag, atol=1e-13, rtol=0)
        assert not s.requires_grad or lag.abs().max() > 1e-3


def test_update_per_micro_batch_is_the_published_recursion() -> None:
    task, record, m = small_task(TeacherConfig(update="micro_batch"), momentum=0.9), [], 0.9
    teacher = [p.detach().clone() for p in task.student.parameters()]
    train(task, 3, 2, record)
    for step in range(3):
        old, new = record[2 * step], record[2 * step + 2]
        teacher = [m**2 * t + m * (1 - m) * s0 + (1 - m) * s1 for t, s0, s1 in zip(teacher, old, new, strict=True)]
    for expected, p in zip(teacher, task.teacher.parameters(), strict=True):
        torch.testing.assert_close(p.detach(), expected, atol=1e-13, rtol=0)


def test_momentum_is_constant_to_the_last_epoch_and_cosine_ends_at_one() -> None:
    constant = small_task(total_steps=1600 * 312)
    assert constant.momentum_at(0) == constant.momentum_at(1599 * 312) == 0.996
    cosine = small_task(TeacherConfig(schedule="cosine"), total_steps=1000)
    assert cosine.momentum_at(0) == pytest.approx(0.996)
    assert cosine.momentum_at(500) == pytest.approx(0.998)
    assert cosine.momentum_at(900) == pytest.approx(0.999902, abs=1e-6)
    assert cosine.momentum_at(1000) == 1.0


def test_ema_keeps_constants_and_does_nothing_where_the_step_was_not_finite() -> None:
    value = torch.rand(100)
    kept = value.clone()
    for _ in range(50):
        ema_update([kept], [value], 0.996, TRUE)
    assert torch.equal(kept, value)
    ema_update([kept], [value + 1], 0.996, torch.tensor(False))
    assert torch.equal(kept, value)


def test_own_teacher_mask_uses_its_own_noise_and_the_students_patches() -> None:
    task = small_task(TeacherConfig(mask="own"))
    with torch.no_grad():
        for p in task.teacher.parameters():
            p.add_(0.1)
    batch = small_batch(0, own_noise=True)
    consistency = task.losses(batch, Place(0, 0, 0))["consistency"]
    images = (
        batch.images.double() / 255 - torch.tensor((0.5, 0.4, 0.3), dtype=torch.float64).view(3, 1, 1)
    ) / torch.tensor((0.2, 0.3, 0.4), dtype=torch.float64).view(3, 1, 1)
    twins = []
    for network in (task.student, task.teacher):
        twins.append(PlainMAE(network.config, DecoderConfig(embed_dim=8, depth=1, num_heads=2)).double())
        twins[-1].load_state_dict(network.state_dict())
    ids, other = batch.noise.argsort(dim=1), batch.teacher_noise.argsort(dim=1)
    mask = torch.ones(8, 16, dtype=torch.float64).scatter(1, ids[:, :4], 0.0)
    difference = (twins[0](images, ids, 4) - twins[1](images, other, 4)).square().mean(-1)
    torch.testing.assert_close(consistency, (difference * mask).sum() / mask.sum(), atol=1e-12, rtol=1e-12)
    shared_mask = task.losses(small_batch(0), Place(0, 0, 0))["consistency"]
    assert (shared_mask - consistency).abs().item() > 1e-6


def test_mae_is_the_task_without_a_teacher() -> None:
    task = small_task()
    alone = RCMAETask(task.student, None, method())
    assert set(alone.losses(small_batch(0), Place(0, 0, 0))) == {"reconstruction"}
    assert set(alone.modules()) == {"student"}
    alone.after_update(0, TRUE)
    assert alone.exported is task.student and task.exported is task.teacher


def test_teacher_starts_equal_and_gets_no_gradient() -> None:
    task = small_task()
    losses = task.losses(small_batch(0), Place(0, 0, 0))
    assert losses["consistency"].item() == 0.0
    sum(losses.values()).backward()
    assert all(p.grad is None and not p.requires_grad for p in task.teacher.parameters())
    assert task.student.pos_embed.grad is None


def test_losses_are_fp32_under_bf16_autocast() -> None:
    vit = ViTConfig(img_size=(16, 16), patch_size=4, embed_dim=16, depth=2, num_heads=2)
    networks = [MaskedAutoencoder(vit, DecoderConfig(embed_dim=8, depth=1, num_heads=2)) for _ in range(2)]
    networks[0].init_weights(torch.Generator().manual_seed(0))
    task = RCMAETask(*networks, method())
    plain = task.losses(small_batch(0), Place(0, 0, 0))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        low = task.losses(small_batch(0), Place(0, 0, 0))
    for name, value in low.items():
        assert value.dtype == torch.float32
        torch.testing.assert_close(value, plain[name], rtol=0.02, atol=1e-4)


def test_shape_mismatch_is_named() -> None:
    with pytest.raises(ValueError, match=r"\(1, 2, 3\) and \(1, 2, 4\)"):
        hidden_patch_loss(torch.zeros(1, 2, 3), torch.zeros(1, 2, 4))


def test_schedules_match_the_reference() -> None:
    require(schedules(FOLDER))


def test_decay_groups() -> None:
    network = small_task().student
    names = {id(p): n for n, p in network.named_parameters()}
    plain, decayed = (
        [names[id(p)] for p in group["params"]] for group in decay_groups(network.named_parameters(), 0.05)
    )
    assert {"cls_token", "mask_token", "patch_embed.proj.weight"} <= set(decayed)
    assert all(n.endswith(".bias") or "norm" in n for n in plain)
    assert not {"pos_embed", "decoder_pos_embed"} & {*plain, *decayed}
    assert len(plain) + len(decayed) == sum(p.requires_grad for p in network.parameters())
