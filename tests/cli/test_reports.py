"""`ping`, `probe`, `bench` and the help: what they print, where, and how they end."""

import json
import platform
import re
import signal
import sys
from pathlib import Path

import pytest
import sessions
from sessions import Session, ordinary_user, run


def test_alone_it_helps_and_says_that_something_was_missing() -> None:
    status, output, errors = run()
    assert (status, errors) == (2, "")
    for word in ("commands:", "run", "ping", "probe", "bench", "examples:"):
        assert word in output


@pytest.mark.parametrize("words", [["--help"], ["-h"], ["help"], ["--version"]])
def test_what_was_asked_for_is_on_standard_output(words: list[str]) -> None:
    status, output, errors = run(*words)
    assert (status, errors) == (0, "") and "lguestlib" in output


@pytest.mark.parametrize("command", ["run", "ping", "probe", "bench", "conform"])
def test_help_teaches_by_example(command: str) -> None:
    status, output, errors = run(command, "--help")
    assert (status, errors) == (0, "")
    examples = output.partition("examples:\n")[2]
    assert f"  {command} " in examples and max(map(len, output.splitlines())) <= 100
    if command in ("run", "ping"):
        assert "exit status: " in output


def test_help_imports_no_more_than_it_needs() -> None:
    command = [sys.executable, "-X", "importtime", "-m", "lguestlib"]
    errors = run("--help", command=command).errors
    assert "lguestlib.cli" in errors
    ours = re.sub(r".*\| +site\n", "", errors, flags=re.DOTALL)
    for name in ("lguestlib.virtio", "lguestlib.memory", "lguestlib.runtime.launcher", "importlib.metadata"):
        assert name not in ours


PRINTING = [["--help"], ["run", "--help"], ["probe"], ["probe", "--json"]]


@pytest.mark.parametrize("words", PRINTING)
def test_a_reader_that_has_gone_is_no_ones_business(words: list[str]) -> None:
    with Session(*words) as session:
        session.end_output()
        status, _, errors = session.end()
        assert (status, errors) == (1, "")


@pytest.mark.parametrize("words", PRINTING)
def test_a_full_device_is_one_line(words: list[str]) -> None:
    status, _, errors = run(*words, prefix=["sh", "-c", 'exec "$@" >/dev/full', "sh"])
    assert (status, errors) == (1, "lguestlib: standard output: No space left on device\n")


def test_ping_draws_and_counts(hypervisor: str) -> None:
    status, output, errors = run("ping", "--hypervisor", hypervisor, "--count", "3")
    assert status == 0, errors
    assert "net0 transmit" in output and "read(kick)" in output
    assert "3 sent, 3 received" in output
    assert "pings" not in errors


def test_pings_json_is_all_there_is_on_standard_output(hypervisor: str) -> None:
    status, output, errors = run("ping", "--hypervisor", hypervisor, "--count", "7", "--json")
    assert (status, errors) == (0, "")
    report = json.loads(output)
    assert (report["hypervisor"], report["sent"], report["received"]) == (hypervisor, 7, 7)
    assert len(report["pings"]) == 7
    assert set(report["round_trip_us"]) == {"min", "p50", "p90", "p99", "max"}


def test_pings_trace_has_the_pings(tmp_path: Path) -> None:
    trace = tmp_path / "trace.json"
    words = ("ping", "--hypervisor", "inprocess", "--count", "2", "--trace", str(trace))
    assert run(*words).status == 0
    events = json.loads(trace.read_text())["traceEvents"]
    assert sum(event["name"].startswith("writev(") for event in events) >= 2


def test_an_interrupt_ends_pings_quietly() -> None:
    with Session("ping", "--hypervisor", "inprocess", "--count", "200000") as session:
        session.expect("network: ", messages=True)
        session.expect("\n", messages=True)
        session.signal(signal.SIGINT)
        assert session.end() == (130, "", "")


def test_an_interrupt_ends_benchmarks_quietly() -> None:
    with Session("bench", "ring") as session:
        session.expect("ring: ")
        session.signal(signal.SIGINT)
        status, _, errors = session.end()
        assert (status, errors) == (130, "")


def test_an_interrupt_while_nobody_reads_ends_it_too() -> None:
    with Session("ping", "--hypervisor", "inprocess", "--count", "2000", "--json") as session:
        # More than a pipe holds.
        session.expect('{"hypervisor"')
        session.signal(signal.SIGINT)
        assert session.process.wait(sessions.PATIENCE) == 130


def test_probe_tells_what_there_is_and_the_remedy_for_what_is_not() -> None:
    status, output, errors = run("probe", "--json")
    assert (status, errors) == (0, "")
    findings = json.loads(output)
    assert set(findings) >= {"GIL", "switch interval", "kvm", "lguest", "tun", "user-mode-linux", "qemu"}
    for name, finding in findings.items():
        assert finding["name"] == name and finding["detail"]
        assert bool(finding["remedy"]) == (finding["usable"] is False) or finding["usable"] is None
    lines = run("probe").output.splitlines()
    for name in findings:
        assert any(re.match(rf"{re.escape(name)} {{2,}}", line) for line in lines)


def test_probe_for_an_ordinary_user(tmp_path: Path) -> None:
    sessions.user_namespaces_or_skip()
    prefix, command = ordinary_user(tmp_path)
    findings = json.loads(run("probe", "--json", prefix=prefix, command=command).output)
    assert platform.python_version() in findings["python"]["detail"]
    assert findings["kvm"]["usable"] and "IRQFD" in findings["kvm"]["detail"]
    assert findings["private network"] == {
        "name": "private network", "usable": True, "detail": "a TAP device in a user namespace", "remedy": "",
    }  # fmt: skip
    setup = "mount -t tmpfs dev /dev && mknod -m 666 /dev/null c 1 3"
    prefix, command = ordinary_user(tmp_path, {}, setup)
    findings = json.loads(run("probe", "--json", prefix=prefix, command=command).output)
    for name in ("kvm", "tun", "private network"):
        finding = findings[name]
        assert finding["usable"] is False and finding["remedy"]
        assert "no such file" in finding["detail"].lower()


def test_benchs_json_is_all_there_is_on_standard_output() -> None:
    status, output, errors = run("bench", "ring", "--json")
    assert (status, errors) == (0, "")
    figures = json.loads(output)
    assert all(figure["ratio"] > 0 and figure["name"].startswith("ring: ") for figure in figures)


def test_bench_shows_figures_as_they_come() -> None:
    output = run("bench", "wake").output
    assert re.fullmatch(r"wake: kick to interrupt .* ns .* x .*\n", output)
