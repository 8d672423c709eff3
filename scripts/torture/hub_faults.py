"""A Hub that answers badly: faults by case, one or several in a run, on the API, the metadata, the bytes, the redirect.

A run ends with exit code 1, one error and a hint, or with 0 and the right bytes. After it the same command,
undisturbed, leaves what it always leaves. Some of the runs are killed as well.
"""

import random
import shutil
from collections.abc import Mapping
from dataclasses import dataclass, replace

from support.hub_stand_in import Fault

from torture import Figures, kernel
from torture.scenarios import SCENARIOS, Bench, shared_bench
from torture.tally import Tally
from torture.tracing import FILES, KILL, SOCKETS, Blow

_SCENARIOS = tuple(each for each in SCENARIOS if each.source.startswith("hub"))
_ALWAYS = 1 << 30
_PAGE = "<html><title>Anmeldung</title>Dienst nicht verfügbar, bitte später</html>".encode("latin-1")
_DEEP = b"[" * 100_000
_JSON = {"Content-Type": "application/json"}
_HTML = {"Content-Type": "text/html; charset=iso-8859-1"}

_PAGES: dict[str, bytes] = {
    "latin-1 page": _PAGE,
    "deep JSON": _DEEP,
    "deep objects": b'{"a":' * 50_000,
    "empty": b"",
    "no text": b"\xff\xfe\x00\x80" * 50,
    "JSON list": b"[1, 2]",
    "JSON of other types": b'{"error": 5, "errors": [5], "sha": 7, "siblings": "x"}',
    "lone surrogate": b'{"sha": "\\ud800", "siblings": [{"rfilename": "\\ud800"}]}',
    "huge number": b'{"sha": ' + b"9" * 5_000 + b"}",
    "large page": b"<p>" * 700_000,
}
_PAUSES = (
    "soon",
    "-5",
    "0.5",
    "1e9",
    "",
    ",",
    "Wed, 21 Oct 2015 07:28:00 GMT",
    "Wed, 99 Foo 2015",
    "9" * 400,
    "\xb2",
    "0",
)
_PLACES = (
    "http://[",
    "http://",
    "ftp://x/y",
    "//",
    ":",
    "http://a b/",
    "http://\xe4:x/",
    "http://127.0.0.1:1/x",
    "/",
    "",
)
_SIZES = ("-5", "many", "0", "1", "9" * 30, "0x10", "\xb2", "100000000000")
_ETAGS = ('"0000"', '"' + "0" * 40 + '"', '"' + "0" * 64 + '"', 'W/"x"', '"../../x"', "", '"' + "a" * 300 + '"')
_RANGES = ("bytes 0-0/1", "bytes */5", "nonsense", "bytes 7-6/-1", "bytes 5-9/" + "9" * 30, "")


def _cases() -> Mapping[str, Fault]:
    """Every kind of fault by a name. How often it comes is the case's own matter."""
    found: dict[str, Fault] = {
        "reset": Fault(),
        "reset of the metadata": Fault(on="HEAD"),
        "reset before the redirect": Fault(on="REDIRECT"),
        "silence": Fault(stall_s=1.5),
        "silence in the body": Fault(drop_after_bytes=3_000, stall_s=1.5),
        "truncated at once": Fault(drop_after_bytes=0),
        "truncated": Fault(drop_after_bytes=1_000),
        "truncated late": Fault(drop_after_bytes=40_000),
        "drip": Fault(bytes_per_s=30_000.0),
        "one byte other": Fault(corrupt_at=10),
        "one byte other, later": Fault(corrupt_at=20_000),
    }
    for name, page in _PAGES.items():
        for status in (200, 206, 204, 301, 400, 403, 404, 416, 500, 503):
            for on in ("GET", "HEAD"):
                found[f"{status} {on}, {name}"] = Fault(status=status, on=on, body=page, headers=dict(_HTML))
        found[f"200, {name}, as JSON"] = Fault(status=200, body=page, headers=dict(_JSON))
    for pause in _PAUSES:
        for status in (429, 503):
            found[f"{status}, Retry-After {pause:.30}"] = Fault(status=status, headers={"Retry-After": pause})
            found[f"{status} HEAD, Retry-After {pause:.30}"] = Fault(
                status=status, on="HEAD", headers={"Retry-After": pause}
            )
    found["429, RateLimit"] = Fault(status=429, headers={"RateLimit": '"api";r=0;t=99999999999999999999'})
    for place in _PLACES:
        for on in ("GET", "HEAD", "REDIRECT"):
            for status in (302, 307):
                found[f"{status} {on} to {place!r}"] = Fault(
                    status=status, on=on, headers={"Location": place}, body=b""
                )
    for on in ("GET", "HEAD"):
        for size in _SIZES:
            found[f"{on}, Content-Length {size:.12}"] = Fault(on=on, headers={"Content-Length": size})
            found[f"{on}, X-Linked-Size {size:.12}"] = Fault(on=on, headers={"X-Linked-Size": size})
        for etag in _ETAGS:
            found[f"{on}, ETag {etag:.12}"] = Fault(on=on, headers={"ETag": etag, "X-Linked-Etag": etag})
        for commit in ("", "0" * 40, "../x", "nonsense"):
            found[f"{on}, commit {commit!r:.12}"] = Fault(on=on, headers={"X-Repo-Commit": commit})
        for encoding in ("gzip", "nonsense", "br"):
            found[f"{on}, encoding {encoding}"] = Fault(on=on, headers={"Content-Encoding": encoding})
    for stated in _RANGES:
        found[f"Content-Range {stated!r:.16}"] = Fault(headers={"Content-Range": stated})
    return found


CASES = _cases()
_FILES = ("api", "*", "*.safetensors", "*.json", "config.json", "*.txt", "model.safetensors.index.json", "LICENSE")


@dataclass(frozen=True, slots=True)
class BadHub:
    """A run against faults: each the name of a case, the files that it concerns, and how many requests.

    `killed_at`: the so many-th watched call before which the run is killed as well, 0 for none.
    """

    scenario: str
    faults: tuple[tuple[str, str, int], ...]
    killed_at: int = 0


CORPUS: tuple[BadHub, ...] = (
    # Errors without a hint.
    BadHub("hub", (("HEAD, X-Linked-Size 100000000000", "*.safetensors", 7),)),
    BadHub("hub", (("one byte other", "*.safetensors", 7),)),
)


def run(seconds: float, seed: int) -> Figures:
    tally = Tally("hub_faults", seconds)
    if why := kernel.unable():
        return Figures("hub_faults", 0, 0, 0.0, unable=why)
    chance = random.Random(seed)
    met: set[str] = set()
    bench = shared_bench()
    for bad in CORPUS:
        _case(bench, tally, bad)
    while tally.time_is_left:
        bad = _drawn(chance)
        met |= {name for name, _, _ in bad.faults}
        _case(bench, tally, bad)
    tally.measure("kinds", f"{len(met)} of {len(CASES)}")
    return tally.figures()


def _drawn(chance: random.Random) -> BadHub:
    [scenario] = chance.choices(_SCENARIOS, [each.every for each in _SCENARIOS])
    names = sorted(CASES)
    faults = tuple(
        (chance.choice(names), chance.choice(_FILES), chance.choice((1, 1, 2, 7, _ALWAYS)))
        for _ in range(chance.choice((1, 1, 1, 2, 3)))
    )
    return BadHub(scenario.name, faults, killed_at=chance.randint(1, 300) if chance.random() < 0.2 else 0)


def _case(bench: Bench, tally: Tally, bad: BadHub) -> None:
    scenario = next(each for each in SCENARIOS if each.name == bad.scenario)
    reference = bench.reference(scenario)
    directory = bench.new_directory()
    for name, files, times in bad.faults:
        bench.hub.fail(files, replace(CASES[name], times=times))
    watch = bench.watch(scenario, directory, FILES | SOCKETS) if bad.killed_at else None
    blows = (Blow(bad.killed_at, KILL),) if bad.killed_at else ()
    ended = bench.run(scenario, directory, watch, blows)
    bench.hub.recover()
    complaint = ended.complaint((0, 1, -9) if bad.killed_at else (0, 1)) or reference.not_whole(directory)
    if not complaint and ended.code == 0:
        complaint = reference.difference(directory, ended)
    again = reference.difference(directory, bench.run(scenario, directory))
    tally.count(complaint or (f"run again: {again}" if again else ""), bad)
    shutil.rmtree(directory)
