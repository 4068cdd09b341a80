#!/usr/bin/env python3
"""kill.py: processes of pureftpd.py are killed (SIGKILL) at random moments under load; nothing may be left, lost or feigned.

    python3 .ci/kill.py --events N [--seed N]
    python3 .ci/kill.py [--times N] [--kinds SERVER,TLS,LOGIN,IDLE,UPLOADING,DOWNLOADING,PRIV] [--clients N] [--seed N]
                        [-- SWITCH ...]

Linux. As root each account is a user of its own; without root all is one user. A server runs on a free loopback port, and clients
(threads with ftplib; every third under TLS) log in, upload, download and leave without a rest. N times a process of each kind is
killed in the middle of it; switches after -- go to the server (-0, --nosandbox ...). What must be true of every kill:

* who is connected to another process notices nothing: SERVER's end costs only those who have not logged in yet, that of a
  TLS process, a login or a session costs one client, PRIV's end costs nobody the transfer that is running;
* what a client was told is stored (226) is there, whole; what the log calls uploaded has that many bytes; under -0 no file
  is ever cut off;
* afterwards no entry is on the scoreboard, no process is left, and the port can be bound again.

With --events it is pureftpd.py events that is killed, N times at any moment, its keeper, its reader or both, while its log grows
and is rotated: every event must have been handed over, for the first time in its order.

The last line is "N kills, N failures"; the exit status is 1 when there was a failure. It takes about 0.2 s a kill.
"""

import argparse
import contextlib
import ftplib
import hashlib
import io
import os
import pathlib
import random
import re
import shutil
import signal
import socket
import ssl
import subprocess
import sys
import tempfile
import threading
import time
from typing import Callable

HERE = pathlib.Path(__file__).resolve().parent.parent
KINDS = ("SERVER", "TLS", "LOGIN", "IDLE", "UPLOADING", "DOWNLOADING", "PRIV")
QUIET_SECONDS = 15                  # within which everything is gone, or back


def contents(name: str) -> bytes:
    """What a file of that name holds: 1 byte to 3 MiB, which only its name decides."""
    seed = hashlib.sha256(name.encode()).digest()
    return (seed * 98304)[:1 + int.from_bytes(seed[:4], "big") % (len(seed) * 98304)]


def proc(pid: int, what: str) -> str:
    """A file of /proc/PID; "" when the process is gone."""
    try:
        return pathlib.Path(f"/proc/{pid}/{what}").read_text()
    except OSError:
        return ""


def children(pid: int) -> "list[int]":
    return [int(child) for child in proc(pid, f"task/{pid}/children").split()]


class Client(threading.Thread):
    """Logs in, moves files and leaves, again and again. What goes wrong is noted with the time at which it did."""

    def __init__(self, world: "World", number: int) -> None:
        super().__init__(daemon=True)
        self.world, self.number, self.tls = world, number, number % 3 == 2
        self.made = 0

    def run(self) -> None:
        while not self.world.over.is_set():
            stage = "visit"
            try:
                with ftplib.FTP_TLS(context=self.world.context) if self.tls else ftplib.FTP() as ftp:
                    ftp.connect("127.0.0.1", self.world.port, timeout=QUIET_SECONDS)
                    ftp.login("joe", "secret")
                    stage = "session"
                    if self.tls:
                        ftp.prot_p()
                    for _ in range(3):
                        self.move(ftp)
                    stage = "goodbye"
                    ftp.quit()
                self.world.rounds += 1
            except (OSError, EOFError, ftplib.Error) as error:
                with self.world.lock:
                    self.world.failed.append((stage, self.number, repr(error)))
                self.world.over.wait(0.02)

    def move(self, ftp: ftplib.FTP) -> None:
        """One file up and down."""
        self.made += 1
        name = f"{self.number}-{self.made % 40}"
        wanted = contents(name)
        with self.world.lock:
            self.world.stored.discard(name)
        ftp.storbinary("STOR " + name, io.BytesIO(wanted))
        with self.world.lock:
            self.world.stored.add(name)
        got: "list[bytes]" = []
        ftp.retrbinary("RETR " + name, got.append)
        if b"".join(got) != wanted:
            self.world.complain(f"{name} came back with {sum(map(len, got))} bytes of {len(wanted)}, or others")


class World:
    """The server, its clients, and what they have seen."""

    def __init__(self, place: pathlib.Path, switches: "list[str]") -> None:
        self.place, self.home, self.state = place, place / "home", place / "state"
        self.home.mkdir()
        place.chmod(0o755)
        if not os.geteuid():
            os.chown(self.home, 12345, 12345)
        program = [sys.executable, str(HERE / "pureftpd.py")]
        cheap = subprocess.run(["openssl", "passwd", "-1", "secret"], check=True, text=True, stdout=subprocess.PIPE).stdout
        (place / "passwd").write_text(f"joe:{cheap.strip()}:12345:12345::{self.home}/./" + ":" * 12 + "\n")
        subprocess.run([*program, "pw", "mkdb", str(place / "users.pdb"), "-f", str(place / "passwd")], check=True)
        with socket.create_server(("127.0.0.1", 0)) as probe:
            self.port = probe.getsockname()[1]
        self.command = [*program, "-f", "stderr", "-H", "-E", "-A", "-S", f"127.0.0.1,{self.port}", "-c", "50", "--banafter", "0",
                        "-l", f"puredb:{place}/users.pdb", "--statedir", str(self.state), "-g", str(place / "pid"),
                        "-Y", "1", "--tlsselfsigned", "-2", str(place / "cert.pem"), *switches]
        self.atomic = "-0" in switches
        self.context = ssl.create_default_context()
        self.context.check_hostname, self.context.verify_mode = False, ssl.CERT_NONE
        self.over, self.lock = threading.Event(), threading.Lock()
        self.failed: "list[tuple[str, int, str]]" = []      # (stage, client, error) since the last kill
        self.stored: "set[str]" = set()                     # names of which a client was told that they are there
        self.rounds = self.kills = self.failures = 0
        self.owed = 0                                       # clients that may still be hit by the kill before

    def start(self) -> None:
        with open(self.place / "log", "ab") as log:
            self.server = subprocess.Popen(self.command, stderr=log, stdin=subprocess.DEVNULL)
        self.until("the server answers", self.answers)

    def answers(self) -> bool:
        with contextlib.suppress(OSError), socket.create_connection(("127.0.0.1", self.port), 5) as sock:
            return sock.recv(3) == b"220"
        return False

    def until(self, what: str, true: "Callable[[], bool]") -> bool:
        end = time.monotonic() + QUIET_SECONDS
        while not true():
            if time.monotonic() > end:
                self.complain(f"not within {QUIET_SECONDS} s: {what}")
                return False
            time.sleep(0.005)
        return True

    def complain(self, text: str) -> None:
        self.failures += 1
        print("FAILED", text, flush=True)

    def victim(self, kind: str) -> "int | None":
        """A process of that kind, as ps(1) shows them; None while there is none."""
        if kind == "PRIV":
            return self.server.pid
        found = []
        for pid in children(self.server.pid):
            title, lean = proc(pid, "cmdline").strip("\0"), 0 in map(int, re.findall(r"Uid:\t(\d+)", proc(pid, "status")))
            if kind == "LOGIN" and lean or kind != "LOGIN" and title == f"pure-ftpd ({kind})":
                found.append(pid)
        return random.choice(found) if found else None

    def kill(self, kind: str) -> None:
        """Kill one, and see what that has cost."""
        self.until("clients at work", lambda: self.rounds > 0)
        time.sleep(random.random() * 0.05)
        end, pid = time.monotonic() + QUIET_SECONDS, None
        while pid is None and time.monotonic() < end:
            pid = self.victim(kind)
        if pid is None:
            return self.complain(f"no process of the kind {kind} in {QUIET_SECONDS} s")
        with self.lock:
            self.failed.clear()
        others = children(pid) if kind == "PRIV" else []
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)
        self.kills += 1
        if kind == "PRIV":
            self.server.wait()
            for child in others:
                self.until(f"process {child} ends after PRIV", lambda child=child: not proc(child, "cmdline"))
            self.start()
        self.rounds = 0
        self.until("clients at work again", lambda: self.rounds >= 2)
        self.judge(kind, pid)

    def judge(self, kind: str, pid: int) -> None:
        """Whether only those have noticed who had to."""
        with self.lock:
            failed = list(self.failed)
        late = [entry for entry in failed if entry[0] == "session"]
        early = [entry for entry in failed if entry[0] == "visit"]
        most_late = {"SERVER": 0, "PRIV": 1000}.get(kind, 1)
        most_early = {"SERVER": 1000, "PRIV": 1000}.get(kind, 1)
        if len(late) > most_late or len(early) > most_early + self.owed:
            self.complain(f"kill of {kind} {pid}: {failed}")
        self.owed = max(0, most_early - len(early))

    def judge_files(self) -> None:
        """What was told to be there is there; under -0 whatever is there is whole."""
        for path in self.home.iterdir():
            whole = path.read_bytes() == contents(path.name)
            if path.name.startswith(".pureftpd-upload."):
                continue
            if not whole and (path.name in self.stored or self.atomic):
                self.complain(f"{path.name} has {path.stat().st_size} bytes of {len(contents(path.name))}, or others")
        for name in self.stored:
            if not (self.home / name).exists():
                self.complain(f"{name} was stored, and is not there")
        for line in (self.place / "log").read_text(errors="replace").splitlines():
            said = re.search(r"/([\d-]+) uploaded  \((\d+) bytes", line)
            if said and int(said[2]) != len(contents(said[1])):
                self.complain(f"the log calls it uploaded: {line}")
            if "bug:" in line or "Traceback" in line:
                self.complain(line)

    def stop(self) -> None:
        """End it, and look at what is left."""
        self.over.set()
        for client in self.clients:
            client.join(2 * QUIET_SECONDS)
        self.judge_files()
        self.until("no session's entry on the scoreboard", lambda: not list(self.state.glob("client-*")))
        everybody = children(self.server.pid)
        self.server.terminate()
        if self.server.wait(QUIET_SECONDS) != 0:
            self.complain(f"the server ends with {self.server.returncode}")
        for pid in everybody:
            self.until(f"process {pid} ends", lambda pid=pid: not proc(pid, "cmdline"))
        with contextlib.suppress(OSError), socket.create_server(("127.0.0.1", self.port)):
            return
        self.complain("the port cannot be bound again")

    def run(self, kinds: "list[str]", times: int, clients: int) -> None:
        self.start()
        self.clients = [Client(self, number) for number in range(clients)]
        for client in self.clients:
            client.start()
        try:
            for turn in range(times):
                for kind in kinds:
                    self.kill(kind)
                if turn % 20 == 19:
                    print(f"{self.kills} kills, {self.failures} failures", flush=True)
        finally:
            self.stop()


class EventsWorld:
    """A log that grows and is rotated, and pureftpd.py events that reads it."""

    def __init__(self, place: pathlib.Path) -> None:
        self.log, self.out, program = place / "log", place / "out", place / "program"
        program.write_text(f'#!/bin/sh\necho "$EVENT_PATH" >> {self.out}\n')
        program.chmod(0o755)
        start = "import pureftpd, sys; sys.exit(pureftpd.tool_events(sys.argv[1:]))"       # compiled once
        self.command = [sys.executable, "-c", start, "--log", str(self.log), "-r", str(program),
                        *(() if os.geteuid() else ("-u", "0"))]
        self.over, self.written, self.kills = threading.Event(), 0, 0

    def write(self) -> None:
        """An event each 20 to 200 ms; now and then the log is moved away, and packed, or copied and truncated."""
        while not self.over.wait(random.uniform(0.02, 0.2)):
            self.written += 1
            line = '{"time":%.6f,"event":"upload","path":"/%d"}\n' % (time.time(), self.written)
            with open(self.log, "a") as file:
                file.write(line)
            if self.written % 100 == 0:
                self.rotate(self.log.with_name("log.%d" % self.written))

    def rotate(self, old: pathlib.Path) -> None:
        if random.random() < 0.3:
            shutil.copy2(self.log, old)
            os.truncate(self.log, 0)
            return
        self.log.rename(old)
        if random.random() < 0.3:
            subprocess.run(["gzip", str(old)], check=True)

    def done(self) -> int:
        """The size of what the program has written."""
        return self.out.stat().st_size if self.out.exists() else 0

    def run(self, times: int) -> int:
        """The number of failures."""
        subprocess.run([*self.command, "--once"], check=True, cwd=HERE)     # the first event belongs to the queue
        writer = threading.Thread(target=self.write)
        writer.start()
        for _ in range(times):
            before, process = self.done(), subprocess.Popen(self.command, cwd=HERE)
            end = time.monotonic() + QUIET_SECONDS
            while self.done() == before and time.monotonic() < end:
                time.sleep(0.001)
            time.sleep(random.uniform(0, 0.05))
            group = children(process.pid) or [process.pid]
            for pid in random.choice(([process.pid], group, [process.pid, *group])):
                with contextlib.suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGKILL)
            process.wait()
            self.kills += 1
        self.over.set()
        writer.join()
        subprocess.run([*self.command, "--once"], check=True, cwd=HERE)
        got = self.out.read_text().split()
        print(f"{self.written} events, {len(got)} runs of the program")
        return int(list(dict.fromkeys(got)) != [f"/{number}" for number in range(1, self.written + 1)])


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--times", type=int, default=30)
    parser.add_argument("--kinds", default=",".join(KINDS))
    parser.add_argument("--clients", type=int, default=6)
    parser.add_argument("--seed", type=int, default=None)
    parser.add_argument("--events", type=int, default=0)
    parser.add_argument("switches", nargs="*", help="for the server, after --")
    chosen = parser.parse_args()
    random.seed(chosen.seed)
    place = pathlib.Path(tempfile.mkdtemp(prefix="kill."))
    if chosen.events:
        events = EventsWorld(place)
        failures = events.run(chosen.events)
        print(f"{events.kills} kills, {failures} failures" + f"; see {place}" * bool(failures))
        return failures
    world = World(place, chosen.switches)
    world.run(chosen.kinds.split(","), chosen.times, chosen.clients)
    print(f"{world.kills} kills, {world.failures} failures")
    if not world.failures:
        shutil.rmtree(place)
    return bool(world.failures)


if __name__ == "__main__":
    sys.exit(main())
