#!/usr/bin/env python3
"""ports.py: many clients of pureftpd.py share few passive ports; is anybody refused, and what does it cost?

    python3 .ci/ports.py [--clients 300] [--transfers 20] [--ports 10,1000] [--rounds 3]

A server on a loopback port for each number of ports; all clients log in, then all at once each makes its transfers (EPSV,
connect, RETR of 20 kB) one after the other. A line for each run, then for each number of ports its best time as a part of
the last one's.
The exit status is 1 when a transfer failed, or fewer ports took more than 1.2 times as long as the last number of them.
"""

import argparse
import asyncio
import os
import pathlib
import re
import shutil
import subprocess
import sys
import tempfile
import threading
import time

HERE = pathlib.Path(__file__).resolve().parent.parent
sys.path.insert(0, str(HERE))
import pureftpd  # noqa: E402

SIZE, REPLY_SECONDS, LOGINS_AT_ONCE, ALLOWED = 20000, 60, 8, 1.2
UID = 12345 if os.geteuid() == 0 else os.geteuid()


def free_range(count: int) -> int:
    """The first of as many ports that nobody listens on, below those of outgoing connections."""
    taken = set()
    for path in ("/proc/net/tcp", "/proc/net/tcp6"):
        with open(path) as file:
            taken |= {int(line.split()[1].rpartition(":")[2], 16) for line in list(file)[1:]}
    return next(first for first in range(20000, 30000, 100) if not taken & set(range(first, first + count)))


class Server:
    """pureftpd.py with `ports` passive ports, and the lines of its log."""

    def __init__(self, ports: int, clients: int) -> None:
        self.place = tempfile.mkdtemp()
        os.chmod(self.place, 0o755)
        home = os.path.join(self.place, "home")
        os.mkdir(home)
        with open(os.path.join(home, "file"), "wb") as file:
            file.write(os.urandom(SIZE))
        record = pureftpd.crypt_in_python(b"secret", b"$1$saltsalt$") + b":%d:%d::%s/./" % (UID, UID, home.encode())
        with open(os.path.join(self.place, "users.pdb"), "wb") as file:
            file.write(pureftpd.puredb_build([(b"user", record)]))
        first = free_range(ports)
        self.process = subprocess.Popen(
            [sys.executable, str(HERE / "pureftpd.py"), "-S", "127.0.0.1,0", "-f", "stderr", "-H", "-c", str(clients),
             "--statedir", os.path.join(self.place, "state"), "-g", os.path.join(self.place, "pid"),
             "-l", "puredb:" + os.path.join(self.place, "users.pdb"), "-p", "%d:%d" % (first, first + ports - 1)],
            stderr=subprocess.PIPE, cwd=self.place, text=True)
        assert self.process.stderr is not None
        found = next(filter(None, (re.search(r"Listening on \S+ port (\d+)", line) for line in self.process.stderr)))
        self.port, self.lines = int(found[1]), []   # type: int, list[str]
        self.reader = threading.Thread(target=lambda: self.lines.extend(self.process.stderr or ()))
        self.reader.start()

    def stop(self) -> None:
        self.process.terminate()
        self.process.wait()
        self.reader.join()
        shutil.rmtree(self.place)


async def reply(reader: asyncio.StreamReader) -> str:
    """The last line of the next reply."""
    while True:
        line = (await asyncio.wait_for(reader.readline(), REPLY_SECONDS)).decode()
        if not line or line[3:4] == " ":
            return line


class Run:
    """One crowd of clients at one server."""

    def __init__(self, port: int) -> None:
        self.port = port
        self.failures: "list[str]" = []
        self.longest = 0.0                          # that a client waited for EPSV's reply

    async def login(self, logins: asyncio.Semaphore) -> "tuple[asyncio.StreamReader, asyncio.StreamWriter]":
        async with logins:
            reader, writer = await asyncio.open_connection("127.0.0.1", self.port)
            await reply(reader)
            for line in ("USER user", "PASS secret", "TYPE I"):
                writer.write(line.encode() + b"\r\n")
                code = await reply(reader)
        if not code.startswith("200"):
            self.failures.append(code)
        return reader, writer

    async def transfers(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter, number: int) -> None:
        for _ in range(number):
            code = await self.transfer(reader, writer)
            if not code.startswith("226"):
                self.failures.append(code)
        writer.close()

    async def transfer(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> str:
        """The last reply."""
        begun = time.monotonic()
        writer.write(b"EPSV\r\n")
        code = await reply(reader)
        self.longest = max(self.longest, time.monotonic() - begun)
        if not code.startswith("229"):
            return code
        data, other = await asyncio.open_connection("127.0.0.1", int(code.split("|")[3]))
        writer.write(b"RETR file\r\n")
        code = await reply(reader)
        if code.startswith("150"):
            size = len(await data.read(-1))
            code = await reply(reader)
            code = code if size == SIZE else "%d bytes, then %s" % (size, code)
        other.close()
        return code

    async def go(self, clients: int, transfers: int) -> float:
        """How long all transfers took, in seconds."""
        logins = asyncio.Semaphore(LOGINS_AT_ONCE)
        crowd = await asyncio.gather(*(self.login(logins) for _ in range(clients)))
        begun = time.monotonic()
        await asyncio.gather(*(self.transfers(reader, writer, transfers) for reader, writer in crowd))
        return time.monotonic() - begun


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--clients", type=int, default=300)
    parser.add_argument("--transfers", type=int, default=20)
    parser.add_argument("--ports", default="10,1000")
    parser.add_argument("--rounds", type=int, default=3)
    given = parser.parse_args()
    best: "dict[int, float]" = {}
    failures = 0
    numbers = [int(word) for word in given.ports.split(",")]
    for _ in range(given.rounds):
        for ports in numbers:
            server = Server(ports, given.clients)
            run = Run(server.port)
            try:
                seconds = asyncio.run(run.go(given.clients, given.transfers))
            finally:
                server.stop()
            wished = [line.partition("] ")[2].strip() for line in server.lines if "wished for" in line]
            print("%4d ports: %d transfers in %.2f s, %d failed %s, longest wait %.2f s; %s" % (
                ports, given.clients * given.transfers, seconds, len(run.failures), run.failures[:1], run.longest,
                wished or "none was wanting"), flush=True)
            best[ports] = min(seconds, best.get(ports, seconds))
            failures += len(run.failures)
    for ports in numbers:
        print("%4d ports: %.2f of the time of %d" % (ports, best[ports] / best[numbers[-1]], numbers[-1]))
    return int(failures > 0 or any(best[ports] > ALLOWED * best[numbers[-1]] for ports in numbers))


if __name__ == "__main__":
    sys.exit(main())
