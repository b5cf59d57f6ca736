"""Children of remote parents are saved from one download."""

from __future__ import annotations

from pathlib import Path

from hub_client import BASE, REASONER, Client, local_child, pieces, weights_of

from surgery.operators.merge.aoe import AssemblyOfExperts
from surgery.stream.save import SaveOptions
from surgery.stream.source import open_checkpoint
from surgery.stream.together import family_of, save_together

LAMBDAS = (0.0, 0.3, 0.7, 1.0)
SHARD = 1_000_000


def test_a_family_from_the_hub_is_one_download(
    client: Client, parents: dict[str, Path], tmp_path: Path
) -> None:
    hub = client.hub()
    remote = {
        "base": open_checkpoint(BASE, "base", hub),
        "reasoner": open_checkpoint(REASONER, "reasoner", hub),
    }
    family = family_of(
        [AssemblyOfExperts(base="base", weights={"reasoner": w}).apply(remote) for w in LAMBDAS],
        "source",
        SHARD,
    )
    assert family is not None
    opening = len(client.server.seen)
    folders = [tmp_path / f"child-{number}" for number in range(4)]
    save_together(family, folders, [SaveOptions(shard_bytes=SHARD, threads=2)] * 4)
    for folder, weight in zip(folders, LAMBDAS, strict=True):
        alone = local_child(parents, {"weights": {"reasoner": weight}})
        assert weights_of(folder) == weights_of(alone.save(tmp_path / f"a{weight}", shard_bytes=SHARD).folder)
    asked: dict[str, list[tuple[int, int]]] = {}
    for each in client.server.seen[opening:]:
        if each.range and each.name.endswith(".safetensors"):
            asked.setdefault(each.path.partition("?")[0], []).append(each.range)
    total = sum(pieces(ranges)[0] for ranges in asked.values())
    once = sum(stop - start for ranges in asked.values() for start, stop in pieces(ranges)[1])
    assert once == sum(family.reads.values()) and total <= 1.02 * once
