"""What is measured of the teacher in a run: against plain computation, and without touching the run."""

import json
import math
from pathlib import Path

import pytest
import torch
from torch import Tensor

from core.config import load_config
from core.distributed import Processes
from core.engine import update
from core.optim import OptimConfig, adamw, decay_groups
from core.task import Place
from core.vit import ViTConfig
from pretrain.data import PretrainBatch
from pretrain.dynamics import Dynamics
from pretrain.mae import DecoderConfig, MaskedAutoencoder
from pretrain.rc_mae import Method, RCMAETask, TeacherConfig
from pretrain.run import pretrain
from pretrain.settings import PretrainConfig
from tests.tiny import draw_images, tiny_overrides

VIT = ViTConfig(img_size=(16, 16), patch_size=4, embed_dim=16, depth=1, num_heads=2)
DECODER = DecoderConfig(embed_dim=8, depth=1, num_heads=2)
TRUE = torch.tensor(True)


def batch(seed: int) -> PretrainBatch:
    generator = torch.Generator().manual_seed(seed)
    return PretrainBatch(
        images=torch.randint(0, 256, (6, 3, 16, 16), dtype=torch.uint8, generator=generator),
        sizes=torch.tensor([(16, 16)] * 6), valid=torch.ones(6, dtype=torch.bool),
        noise=torch.rand(6, 16, generator=generator),
    )  # fmt: skip


def task_with(every_steps: int, teacher: TeacherConfig, momentum: float = 0.9) -> RCMAETask:
    student, average = MaskedAutoencoder(VIT, DECODER), MaskedAutoencoder(VIT, DECODER)
    student.init_weights(torch.Generator().manual_seed(0))
    method = Method(
        mask_ratio=0.75, norm_pix_loss=True, gamma=0.7, momentum=momentum, teacher=teacher, total_steps=9,
        mean=(0.5,) * 3, std=(0.2,) * 3,
    )  # fmt: skip
    return RCMAETask(student, average, method, dynamics=Dynamics(every_steps, student, average, Processes()))


def weights(network: MaskedAutoencoder) -> Tensor:
    return torch.cat([p.detach().flatten() for n, p in network.named_parameters() if "pos_embed" not in n])


@pytest.mark.parametrize("accumulation", [1, 2])
def test_figures_equal_plain_computation(accumulation: int) -> None:
    task = task_with(3, TeacherConfig())
    optimizer = adamw(decay_groups(task.named_parameters(), 0.05), OptimConfig())
    for group in optimizer.param_groups:
        group["lr"] = 1e-2
    history = [weights(task.student)]
    trainable = [p for _, p in task.named_parameters() if p.requires_grad]
    for step in range(6):
        wanted: dict[str, Tensor] = {}
        for turn in range(accumulation):
            for name, loss in task._losses(batch(10 * step + turn)).items():
                gradients = torch.autograd.grad(loss, trainable, retain_graph=True)
                wanted[name] = wanted.get(name, 0) + torch.cat([g.flatten() for g in gradients]) / accumulation
            losses = task.losses(batch(10 * step + turn), Place(step, turn, turn))
            (torch.stack(list(losses.values())).sum() / accumulation).backward()
        before = weights(task.teacher)
        update(optimizer, TRUE)
        task.after_update(step, TRUE)
        history.append(weights(task.student))
        found = task.observe(step)
        if step not in (2, 5):
            assert found == {}
            continue
        r, c, previous = wanted["reconstruction"], wanted["consistency"], history[-2] - history[-3]
        after, s = weights(task.teacher), history[-1]
        assert found == pytest.approx(
            {
                "dynamics/reconstruction_grad_norm": r.norm().item(),
                "dynamics/consistency_grad_norm": c.norm().item(),
                "dynamics/cos_reconstruction_consistency": torch.cosine_similarity(r, c, dim=0).item(),
                "dynamics/cos_reconstruction_previous": torch.cosine_similarity(-r, previous, dim=0).item(),
                "dynamics/cos_consistency_previous": torch.cosine_similarity(-c, previous, dim=0).item(),
                "dynamics/teacher_distance": (after - s).norm().item(),
                "dynamics/effective_momentum": 0.9,
            },
            rel=1e-4,
        )
        assert (after - s).norm() < (before - s).norm()


def test_effective_momentum_is_that_of_all_micro_batches_and_one_where_nothing_was_updated() -> None:
    task = task_with(1, TeacherConfig(update="micro_batch"))
    optimizer = adamw(decay_groups(task.named_parameters(), 0.05), OptimConfig())
    found = []
    for step in range(4):
        for group in optimizer.param_groups:
            group["lr"] = 1e-2 if step == 1 else 0.0
        for turn in range(2):
            torch.stack(list(task.losses(batch(turn), Place(step, turn, turn)).values())).sum().backward()
        finite = torch.tensor(step != 3)
        update(optimizer, finite)
        task.after_update(step, finite)
        found.append(task.observe(step)["dynamics/effective_momentum"])
    assert math.isnan(found[0])  # teacher and student are still one
    assert found[2] == pytest.approx(0.9**2, rel=1e-4)  # the student stood still: both averages count alike
    assert found[3] == pytest.approx(0.9, rel=1e-4)  # the optimizer's update was suppressed, and its average with it


def test_a_run_ends_in_the_same_bits_with_and_without(tmp_path: Path) -> None:
    data, digests = draw_images(tmp_path / "data"), {}
    for name, changes in {"off": {}, "on": {"dynamics__every_steps": 2}}.items():
        overrides = tiny_overrides(data, tmp_path / name, **changes)
        digests[name] = pretrain(load_config(PretrainConfig, None, overrides))["digest"]
    assert digests["on"] == digests["off"]
    rows = [json.loads(line) for line in (tmp_path / "on" / "metrics.jsonl").read_text().splitlines()]
    measured = {row["step"] for row in rows if "dynamics/teacher_distance" in row}
    assert measured == {2, 4, 6}
    assert "cos_consistency_previous" in (tmp_path / "on" / "metrics.jsonl").read_text()
    assert (tmp_path / "on" / "dynamics.png").read_bytes().startswith(b"\x89PNG")
    assert not (tmp_path / "off" / "dynamics.png").exists()
    assert "dynamics/" not in (tmp_path / "off" / "metrics.jsonl").read_text()


def test_mae_has_the_figures_of_its_one_loss(tmp_path: Path) -> None:
    data = draw_images(tmp_path / "data")
    overrides = tiny_overrides(data, tmp_path / "out", method="mae", momentum=0.996, dynamics__every_steps=3)
    pretrain(load_config(PretrainConfig, None, overrides))
    rows = [json.loads(line) for line in (tmp_path / "out" / "metrics.jsonl").read_text().splitlines()]
    names = {name for row in rows for name in row if name.startswith("dynamics/")}
    assert names == {"dynamics/reconstruction_grad_norm", "dynamics/cos_reconstruction_previous"}


def test_fsdp_is_refused_in_one_line(tmp_path: Path) -> None:
    overrides = tiny_overrides(tmp_path, tmp_path / "out", engine__parallel="fsdp2", dynamics__every_steps=3)
    with pytest.raises(ValueError, match=r"dynamics.every_steps and engine.parallel=fsdp2: .* use engine.parallel=ddp"):
        load_config(PretrainConfig, None, overrides)
