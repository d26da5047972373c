"""Shards behind URLs: every image once per pass, resumable at a shard, and whatever is wrong names the URL."""

import io
import shutil
import tarfile
import threading
from collections.abc import Iterator
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from itertools import islice
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch.utils.data import DataLoader

import core.streams
from core.checkpoint import read_checkpoint
from core.config import load_config
from core.errors import DataError
from core.loader import Broken, Feed, Loaded, StreamedImages, stream_loader, worker_faults
from core.streams import ShardStream, expand_urls, is_stream, shard_images
from core.transforms import AugmentConfig
from pretrain.data import PrepareSample, collate
from pretrain.run import pretrain
from pretrain.settings import PretrainConfig
from tests.tiny import tiny_overrides

IMAGES_PER_SHARD = 5
PREPARE = PrepareSample((8, 8), num_patches=4, augment=AugmentConfig(), own_teacher_mask=False)
TIMEOUT_S = 60


@dataclass
class Site:
    """What the loopback server answers, by path."""

    address: str
    pages: dict[str, bytes] = field(default_factory=dict)
    promised_sizes: dict[str, int] = field(default_factory=dict)  # a Content-Length that is not the truth
    redirects: dict[str, str] = field(default_factory=dict)
    raw: dict[str, bytes] = field(default_factory=dict)  # bytes sent instead of any HTTP

    def url(self, path: str) -> str:
        return f"{self.address}{path}"


@pytest.fixture
def site(monkeypatch: pytest.MonkeyPatch) -> Iterator[Site]:
    monkeypatch.setenv("no_proxy", "*")
    site = Site("")

    class Answer(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            if self.path in site.raw:
                self.wfile.write(site.raw[self.path])
            elif self.path in site.redirects:
                self.send_response(302)
                self.send_header("Location", site.redirects[self.path])
                self.end_headers()
            elif self.path in site.pages:
                body = site.pages[self.path]
                self.send_response(200)
                self.send_header("Content-Length", str(site.promised_sizes.get(self.path, len(body))))
                self.end_headers()
                self.wfile.write(body)
            else:
                self.send_error(404)

        def log_message(self, *_: object) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Answer)
    site.address = f"http://127.0.0.1:{server.server_port}"
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True)
    thread.start()
    yield site
    server.shutdown()
    server.server_close()
    thread.join()


def tar_of(members: dict[str, bytes]) -> bytes:
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w") as tar:
        for name, data in members.items():
            member = tarfile.TarInfo(name)
            member.size = len(data)
            tar.addfile(member, io.BytesIO(data))
    return buffer.getvalue()


def picture(number: int) -> bytes:
    buffer = io.BytesIO()
    Image.new("RGB", (10, 12), (number, number, number)).save(buffer, "PNG")
    return buffer.getvalue()


def publish(site: Site, num_shards: int = 3, broken: tuple[int, ...] = ()) -> tuple[str, ...]:
    """Shards 0.tar, 1.tar, ... of five one-coloured images each, with labels between them; returns their URLs."""
    for shard in range(num_shards):
        members = {}
        for number in range(shard * IMAGES_PER_SHARD, (shard + 1) * IMAGES_PER_SHARD):
            members[f"{number:03d}.png"] = b"not a picture" if number in broken else picture(number)
            members[f"{number:03d}.cls"] = b"1"
        site.pages[f"/{shard}.tar"] = tar_of(members)
    return expand_urls(site.url(f"/{{0..{num_shards - 1}}}.tar"))


def numbers(items: list[tuple[int, str, bytes]]) -> list[int]:
    return [int(Path(name).stem) for _, name, _ in items]


def passes(stream: ShardStream, num_workers: int, num_passes: int, start: int = 0) -> list[tuple[int, str, bytes]]:
    """What all workers together see of the positions from `start` up to the end of pass `num_passes`."""
    end = num_passes * len(stream.urls)
    seen = []
    for worker in range(num_workers):
        share = -(-(end - start - (worker - start) % num_workers) // num_workers) * IMAGES_PER_SHARD
        seen += list(islice(stream.images(start, worker, num_workers), share))
    return seen


# --- URLs -----------------------------------------------------------------------------------------------------------


def test_a_pattern_gives_all_its_urls() -> None:
    assert expand_urls("https://h/a-{0000..0002}.tar?x=1") == tuple(f"https://h/a-000{i}.tar?x=1" for i in range(3))
    assert expand_urls("http://h/one.tar") == ("http://h/one.tar",)
    assert expand_urls("http://h/{a,b}/{0..1}.tar") == tuple(f"http://h/{x}/{i}.tar" for x in "ab" for i in range(2))


def test_only_http_is_a_stream() -> None:
    assert is_stream("http://h/a.tar") and is_stream("https://h/{0..9}.tar")
    assert not any(is_stream(data) for data in ("/data/a.tar", "s3://b/a.tar", "pipe:cat a.tar", "file:///a.tar", ""))


@pytest.mark.parametrize(
    ("data", "fault"),
    [
        ("https://h/a-{0..3.tar", "https://h/a-{0..3.tar: unbalanced braces; expected a pattern such as"),
        ("https://h/a.tgz", "https://h/a.tgz: expected http(s) URLs that end in .tar"),
        ("https://h/", "https://h/: expected http(s) URLs that end in .tar"),
        ("https://h/{a.tar,b.zip}", "https://h/b.zip: expected http(s) URLs that end in .tar"),
        ("{https://h/a,file:///b}.tar", "file:///b.tar: expected http(s) URLs that end in .tar"),
        ("https://h/a\n.zip", "https://h/a\\n.zip: expected http(s) URLs that end in .tar"),
    ],
)
def test_other_urls_are_refused(data: str, fault: str) -> None:
    with pytest.raises(DataError) as caught:
        expand_urls(data)
    assert str(caught.value).startswith(fault)


# --- one shard ------------------------------------------------------------------------------------------------------


def test_a_shard_gives_its_images_in_order_and_nothing_else(site: Site) -> None:
    members = {
        "a/1.jpg": b"one",
        "a/1.cls": b"7",
        "b.PNG": b"two",
        ".hidden.png": b"x",
        "a/._1.jpg": b"x",
        "c.txt": b"x",
    }
    site.pages["/s.tar"] = tar_of(members)
    assert list(shard_images(site.url("/s.tar"))) == [("s.tar/a/1.jpg", b"one"), ("s.tar/b.PNG", b"two")]


def fault(url: str) -> str:
    with pytest.raises(DataError) as caught:
        list(shard_images(url))
    assert str(caught.value).isprintable()
    return str(caught.value)


def test_a_missing_shard_names_its_url(site: Site) -> None:
    assert fault(site.url("/gone.tar")) == f"{site.url('/gone.tar')}: cannot be streamed: HTTP Error 404: Not Found"


def test_a_host_that_does_not_answer_names_the_url(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("no_proxy", "*")
    assert fault("http://127.0.0.1:9/a.tar").startswith("http://127.0.0.1:9/a.tar: cannot be streamed: ")


@pytest.mark.parametrize("body", [b"", b"plain text", b"<html>404 with status 200</html>" * 50, bytes(range(256)) * 20])
def test_what_is_no_tar_names_its_url(site: Site, body: bytes) -> None:
    site.pages["/odd.tar"] = body
    assert fault(site.url("/odd.tar")).startswith(f"{site.url('/odd.tar')}: cannot be streamed: ")


def test_a_shard_without_images_names_its_url(site: Site) -> None:
    for members in ({}, {"a.txt": b"x"}):
        site.pages["/empty.tar"] = tar_of(members)
        assert fault(site.url("/empty.tar")).startswith(f"{site.url('/empty.tar')}: no images in this shard")


@pytest.mark.parametrize("connection_lost", [False, True])
def test_a_truncated_shard_is_noticed_at_every_cut(site: Site, connection_lost: bool) -> None:
    whole = tar_of({f"{i}.jpg": bytes([i + 1]) * 700 for i in range(3)})
    end = whole.rindex(b"\x03") + 1 + 324  # after the last member and its padding, where the end mark starts
    assert end % 512 == 0 and whole[end:] == bytes(len(whole) - end)
    for cut in (100, 512, 700, 1400, 1536, 1600, 2048, 3072, 3500, end - 400, end):
        site.pages["/cut.tar"] = whole[:cut]
        if connection_lost:
            site.promised_sizes["/cut.tar"] = len(whole)
        assert fault(site.url("/cut.tar")).startswith(f"{site.url('/cut.tar')}: cannot be streamed: "), cut


def test_a_server_that_speaks_no_http_names_the_url(site: Site) -> None:
    site.raw["/odd.tar"] = b"SSH-2.0-OpenSSH_9.6\r\n"
    site.raw["/chunked.tar"] = b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n400\r\nabc"
    for path in ("/odd.tar", "/chunked.tar"):
        assert fault(site.url(path)).startswith(f"{site.url(path)}: cannot be streamed: ")


def test_a_redirect_leads_to_no_local_file(site: Site, tmp_path: Path) -> None:
    (tmp_path / "local.tar").write_bytes(tar_of({"a.jpg": b"secret"}))
    site.redirects["/r.tar"] = f"file://{tmp_path}/local.tar"
    assert fault(site.url("/r.tar")).startswith(f"{site.url('/r.tar')}: cannot be streamed: ")


# --- the stream -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("num_workers", [1, 2])
def test_every_image_is_seen_once_per_pass(site: Site, num_workers: int) -> None:
    stream = ShardStream(publish(site), seed=0)
    seen = passes(stream, num_workers, num_passes=4)
    for number in range(4):
        of_pass = [item for item in seen if item[0] // 3 == number]
        assert sorted(numbers(of_pass)) == list(range(15))
    assert all(data == picture(int(Path(name).stem)) for _, name, data in seen)


def test_the_order_is_drawn_from_the_seed(site: Site) -> None:
    urls = publish(site)

    def order(seed: int) -> list[int]:
        return numbers(passes(ShardStream(urls, seed), 1, num_passes=2))

    assert order(0) == order(0)
    assert len({tuple(order(seed)) for seed in range(4)}) == 4
    first, second = order(0)[:15], order(0)[15:]
    assert first != second and first != sorted(first)


def test_every_pass_has_its_own_order_of_shards(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(core.streams, "shard_images", lambda url: [(url, b"")])
    urls = tuple("abcdefgh")
    seen = [name for _, name, _ in islice(ShardStream(urls, seed=0).images(0, 0, 1), 32)]
    orders = [tuple(seen[start : start + 8]) for start in range(0, 32, 8)]
    assert all(sorted(order) == list(urls) for order in orders)
    assert len(set(orders)) == 4


def test_one_and_two_workers_see_the_same_images_at_the_same_positions(site: Site) -> None:
    stream = ShardStream(publish(site), seed=3)
    assert sorted(passes(stream, 2, num_passes=2)) == sorted(passes(stream, 1, num_passes=2))


@pytest.mark.parametrize("num_workers", [1, 2])
@pytest.mark.parametrize("start", [1, 2, 3, 7])
def test_a_stream_resumes_at_any_shard(site: Site, num_workers: int, start: int) -> None:
    stream = ShardStream(publish(site), seed=1)
    later = [item for item in passes(stream, 1, num_passes=4) if item[0] >= start]
    assert sorted(passes(stream, num_workers, num_passes=4, start=start)) == sorted(later)


def test_a_shard_larger_than_the_buffer_is_still_seen_once_and_mixed(
    site: Site, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(core.streams, "SHUFFLE_BUFFER", 8)
    site.pages["/big.tar"] = tar_of({f"{i:03d}.jpg": bytes([i]) for i in range(60)})
    stream = ShardStream((site.url("/big.tar"),), seed=0)
    order = numbers(list(islice(stream.images(0, 0, 1), 60)))
    assert sorted(order) == list(range(60)) != order
    assert max(order[:10]) < 20  # the first ones out are of the first ones in: memory stays bounded


# --- batches --------------------------------------------------------------------------------------------------------


def streamed(urls: tuple[str, ...], first: int = 0, micro_batch: int = 5) -> StreamedImages:
    return StreamedImages(ShardStream(urls, 0), 0, PREPARE, collate, micro_batch, first)


def batches(urls: tuple[str, ...], num_workers: int, count: int, first: int = 0) -> list[Loaded]:
    return list(islice(stream_loader(streamed(urls, first), num_workers, TIMEOUT_S), count))


def images_of(items: list[Loaded]) -> list[int]:
    return [number for item in items for number in item.batch.images[:, 0, 0, 0].tolist()]


@pytest.mark.parametrize("num_workers", [0, 1, 2])
def test_batches_hold_every_image_once_per_pass(site: Site, num_workers: int) -> None:
    items = batches(publish(site), num_workers, 6)
    assert [item.shard for item in items] == list(range(6))
    assert sorted(images_of(items[:3])) == sorted(images_of(items[3:])) == list(range(15))


def test_a_sample_is_drawn_from_seed_shard_position_and_name_alone(site: Site) -> None:
    urls = publish(site)
    alone, shared = batches(urls, 0, 6), batches(urls, 2, 6)
    for a, b in zip(alone, shared, strict=True):
        assert torch.equal(a.batch.images, b.batch.images) and torch.equal(a.batch.noise, b.batch.noise)
    noise = torch.cat([item.batch.noise for item in alone])
    assert len(np.unique(noise.numpy(), axis=0)) == 30, "the second pass must draw anew"


@pytest.mark.parametrize("num_workers", [1, 2])
def test_a_feed_resumes_at_the_first_shard_that_is_not_finished(site: Site, num_workers: int) -> None:
    urls = publish(site, num_shards=4)
    loader = stream_loader(streamed(urls, micro_batch=2), num_workers, TIMEOUT_S)
    feed = Feed(loader, 1, 0, shards=[0] * num_workers)
    seen = [int(n) for _ in range(6) for batch in feed.take() for n in batch.images[:, 0, 0, 0]]
    again = batches(urls, num_workers, 4 - min(feed.shards), first=min(feed.shards))
    assert sorted(set(seen) | set(images_of(again))) == list(range(20)), "an image was left out"
    assert len(set(seen) & set(images_of(again))) <= num_workers * IMAGES_PER_SHARD


def test_broken_images_are_passed_over_and_reported(site: Site) -> None:
    items = batches(publish(site, broken=(3, 11)), 0, 2)
    assert {3, 11}.isdisjoint(images_of(items))
    notes = {note for item in items for note in item.broken}
    text = "not an image, or of an unknown format"
    assert notes <= {Broken("0.tar/003.png", text), Broken("2.tar/011.png", text)} and notes


def fault_of(loader: DataLoader) -> str:
    try:
        with worker_faults():
            list(islice(loader, 100))
    except DataError as error:
        return str(error)
    raise AssertionError("the stream did not fail")


@pytest.mark.parametrize("num_workers", [0, 1])
def test_a_stream_of_nothing_but_broken_images_ends(site: Site, num_workers: int) -> None:
    urls = publish(site, broken=tuple(range(15)))
    text = fault_of(stream_loader(streamed(urls), num_workers, TIMEOUT_S))
    assert text.startswith("20 broken images in a row, the last ") and "\n" not in text


@pytest.mark.parametrize("num_workers", [0, 1])
def test_a_shard_that_is_gone_ends_the_stream_with_its_url(site: Site, num_workers: int) -> None:
    urls = publish(site)
    del site.pages["/1.tar"]
    text = fault_of(stream_loader(streamed(urls), num_workers, TIMEOUT_S))
    assert text == f"{urls[1]}: cannot be streamed: HTTP Error 404: Not Found"


# --- a whole run ----------------------------------------------------------------------------------------------------


def test_a_run_trains_on_a_stream_and_goes_on_at_a_shard(
    site: Site, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    publish(site, broken=(7,))
    changes = {"loader__stream_images": 15, "loader__max_broken_share": 0.1, "batch_size": 5, "warmup_epochs": 1}
    overrides = tiny_overrides(Path("x"), tmp_path / "out", epochs=3, **changes)
    config = load_config(PretrainConfig, None, [*overrides, f"data={site.url('/{0..2}.tar')}"])
    summary = pretrain(config)
    assert summary["images_seen"] == 45 and list(summary["broken_images"]) == ["1.tar/007.png"]
    checkpoints = tmp_path / "out" / "checkpoints"
    shutil.rmtree(checkpoints / "step_0000009")
    (shard,) = read_checkpoint(checkpoints / "step_0000008").state["feed"]["shards"]
    assert 6 <= shard <= 8  # the third pass over three shards
    again = pretrain(config)
    assert again["images_seen"] == 45
    text = capsys.readouterr().out
    assert "15 images, streamed: a restart goes on at the shard, not at the image" in text.replace("\n", " ")
    assert "resumed from step 8 of 9" in text
