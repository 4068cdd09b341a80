#!/usr/bin/env python3
"""pureftpd.py: an FTP server in one file, for those who know Pure-FTPd.

Same options, same pure-ftpd.conf, same virtual users, same logs and tools as the original; nothing to install.
Nothing that a stranger sends is read by root. The processes, as ps(1) shows them:

      pure-ftpd (PRIV)             the parent: keeps root for a few system calls, reads nothing of a client, forks
       +- pure-ftpd (SERVER)       unprivileged, in an empty directory: everybody who has not logged in, in one loop
       +- pure-ftpd (TLS)          the same cage, one for each client that said AUTH TLS: handshake, login, then relay
       +- pure-ftpd (IDLE)         one for each login: checks the password as root, then is the user for good

      python3 pureftpd.py --help             options; a configuration file may be the only argument
      python3 pureftpd.py pw useradd ...     tools: pw, pwconvert, quotacheck, ftpwho, uploadscript, authd, statsdecode
      python3 -m unittest                    the tests

The map, foundation first; no section uses what is below it:

    Errors that carry intent                                  what stops a start, answers a client, ends a connection
    System calls that Python does not wrap                    process titles, no_new_privs, Landlock, splice
    Options                                                   a row per option, and the one parser of command lines
    Values of options                                         text -> value, or the reason why not
    Options of the daemon                                     the table: pure-ftpd(8) and what is ours
    Configuration file                                        pure-ftpd.conf, rewritten as a command line
    Log                                                       syslog or stderr, a line an event
    Password hashes                                           verify, make, and cost the same for nobody
    PureDB                                                    pureftpd.passwd and pureftpd.pdb
    Accounts and access rules                                 Account, Peer, from where and when
    Authentication back ends                                  puredb, unix, pam, extauth, sqlite, anonymous
    Messages between the processes                            their layouts, and how they are checked
    Control connection: lines in, replies out                 bytes -> commands, replies -> bytes
    Tree: the files of a session                              who confines a path, and how
    Listings                                                  NLST, MLSD, MLST
    Globs                                                     * ? [] on bytes, with bounded work
    LIST                                                      the original's ls
    Quotas                                                    .ftpquota, exact under concurrency
    Ratios and bandwidth                                      arithmetic, no clock
    Transfer logs                                             clf, stats, w3c, xferlog, json
    State directory                                           what one server shares, safe from others
    Scoreboard                                                who is on, for ftpwho and limits
    Upload pipe                                               uploads announced to uploadscript
    Commands                                                  the table, and what both sides of the login answer
    Data connections                                          PASV, PORT, and how a session waits
    Streams: the bytes of a data connection                   sendfile, splice, ASCII
    OpenSSL beyond the ssl module                             ticket keys, one more ticket, a session handed over, large pieces
    TLS streams                                               data connections under TLS, and a look at a ClientHello
    Session: one user's process                               greeting, loop, replies
    Session: files and directories                            CWD ... SITE
    Session: transfers and listings                           RETR, STOR, LIST ...
    Defender                                                  guessing passwords is made slow
    SERVER: everybody who has not logged in                   one loop for all visitors
    TLS certificates                                          files -> SSLContext, and each client's own ticket keys
    TLS process: one client's handshake, login and relay      TlsDoor
    Privilege separation: everything that may run as root     read this with suspicion
    Setup                                                     what options become: sockets, certificates, own files
    PRIV: the parent of all                                   forks, answers, cleans up
    pw: virtual users                                         pure-pw
    quotacheck: pure-quotacheck                               recount a quota
    ftpwho                                                    who is on: text, HTML, JSON, Prometheus
    uploadscript                                              run a program for each upload
    authd: pure-authd                                         the other end of extauth
    pwconvert: system users to virtual users                  pure-pwconvert
    statsdecode: pure-statsdecode                             readable times in stats logs
    Starting                                                  from the command line to PRIV
"""

import sys



def restart_lean(code) -> None:
    """Go on as a bare interpreter that is given this file's code, already compiled, in a memory file. Returns where
    that cannot be.

    Compiling leaves 30 MiB behind that all our processes would carry (measured: 46 MiB against 15), and a bare
    interpreter (-I -S) has loaded nothing that we did not ask for. Modules come from the interpreter's own
    directories, never from beside this file.
    """
    import marshal
    import os
    if not sys.flags.isolated and not getattr(sys.flags, "safe_path", False):
        sys.path[:] = [p for p in sys.path[1:] if p[:1] == "/" and p != sys.path[0]]
    if not hasattr(os, "memfd_create") or not sys.executable or "PYTHONHOME" in os.environ:
        return
    fd = os.memfd_create("pureftpd.py", 0)
    with open(fd, "wb", closefd=False) as file:
        marshal.dump((code, sys.argv, sys.path, __file__), file)
    flags = ["-I", "-S", *("-W" + word for word in sys.warnoptions), *(["-Xutf8"] if sys.flags.utf8_mode else [])]
    os.execv(sys.executable, [sys.executable, *flags, "-c", LEAN_START, str(fd)])


LEAN_START = """
import marshal, sys
with open(int(sys.argv[1]), "rb") as file:
    file.seek(0)
    code, sys.argv, sys.path, __file__ = marshal.loads(file.read())
LEAN = True
exec(code)
"""
if __name__ == "__main__" and "LEAN" not in globals():
    restart_lean(sys._getframe().f_code)

import errno
import os
import select
import selectors
import signal
import socket
import stat
import struct
import time
from collections import deque
from functools import lru_cache
from heapq import heappop, heappush
from itertools import islice
from typing import Any, Callable, NamedTuple

VERSION = "1.0"


# ==== Errors that carry intent ====================================================================
# What is no error of the program travels as one of these: to the administrator, to the client, to the end of a connection.
# OSError travels untouched and is translated in one place (os_error_reply).


class ConfigError(Exception):
    """The administrator's mistake: one line that says what is wrong, where, and what would be right."""


class Refuse(Exception):
    """Refuse(code, text): the reply that a command ends with instead of its own."""


class Hangup(Exception):
    """The connection is over; nothing more is said to the client."""


def printable(data: bytes) -> str:
    """`data` for a log: UTF-8 as it is, control bytes and what is no UTF-8 as \\xNN."""
    text = data.decode("utf-8", "backslashreplace")
    if text.isprintable():
        return text
    return "".join(c if c.isprintable() else "".join("\\x%02x" % b for b in c.encode("utf-8", "surrogatepass"))
                   for c in text)

# ==== System calls that Python does not wrap ======================================================
# libc through ctypes: names for ps(1), prctl(2), Landlock, and splice(2) for Python 3.9. Each is optional: where
# ctypes, Linux or the kernel's support is missing the function says so by what it returns, and its caller decides
# what that means.
#
# The title of a process is written over its argument and environment area (setproctitle's way), so the environment is
# first copied out of there: glibc's setenv() stores a new string for each variable that is set again.

PR_SET_NAME, PR_SET_NO_NEW_PRIVS = 15, 38
F_SETPIPE_SZ = 1031
M_MMAP_THRESHOLD, MMAP_THRESHOLD = -3, 128 * 1024           # mallopt(3), and glibc's default
LANDLOCK_CREATE_RULESET, LANDLOCK_ADD_RULE, LANDLOCK_RESTRICT_SELF = 444, 445, 446
# LANDLOCK_ACCESS_FS_*, by ABI; the last serves later ones
LANDLOCK_RIGHTS_BY_ABI = (0, 0x1FFF, 0x3FFF, 0x7FFF, 0x7FFF, 0xFFFF)


class LibC:
    """libc's functions, or `None` for `library` where ctypes or the symbols cannot be had."""

    def __init__(self) -> None:
        self.titles: "dict[str, bytes]" = {}            # what process_title() writes for each
        self.title_area = (0, 0, 0)       # address of argv; its length; the length with environ; 0 where unknown
        try:
            import ctypes
            self.ctypes: Any = ctypes
            self.library: Any = ctypes.CDLL(None, use_errno=True)
        except (ImportError, OSError):
            self.ctypes = self.library = None

    def call(self, function: str, *args: Any) -> int:
        """What the C function returns; OSError with its errno when that is -1, ENOSYS when it does not exist."""
        entry = getattr(self.library, function, None)
        if entry is None:
            raise OSError(errno.ENOSYS, function + " is not available")
        result = entry(*args)
        if result == -1:
            number = self.ctypes.get_errno()
            raise OSError(number, os.strerror(number))
        return result

    def syscall(self, number: int, *args: Any) -> int:
        """syscall(2) with every argument a machine word or a pointer."""
        words = [self.ctypes.c_long(a) if isinstance(a, int) else a for a in args] if self.ctypes else args
        return self.call("syscall", self.ctypes.c_long(number) if self.ctypes else number, *words)


libc = LibC()


def title_area_prepare(name: str) -> None:
    """Find where the kernel keeps this process's arguments (proc(5), arg_start and env_end) and move the environment
    away. `name` is what ps and pgrep show for short.
    """
    if not sys.platform.startswith("linux") or libc.library is None:
        return
    try:
        with open("/proc/self/stat", "rb") as file:
            fields = file.read().rpartition(b")")[2].split()
    except OSError:                                     # no /proc here
        return
    arg_start, arg_end, env_start, env_end = map(int, fields[45:49])
    if not arg_start or env_start != arg_end:
        return
    for key, value in os.environb.items():
        os.putenv(key, value)
    libc.library.prctl(PR_SET_NAME, name.encode(), 0, 0, 0)
    libc.title_area = arg_start, arg_end - arg_start, env_end - arg_start


def process_title(title: str) -> None:
    """Show `title` in ps(1); no effect where title_area_prepare() found nothing to write on.

    The kernel shows the arguments' old extent, or up to the first NUL where that extent no longer ends in one.
    """
    address, arguments, length = libc.title_area
    if length:
        text = libc.titles.get(title)
        if text is None:
            text = title.encode()[:length - 1]
            text = libc.titles[title] = text + b"\0" * max(1, arguments - len(text))
        libc.ctypes.memmove(address, text, len(text))


def memory_trim() -> None:
    """Give memory that is free back to the system: compiling this file took 20 MiB, which every fork would go through
    again.

    Measured: a fork, its exit included, costs 1 ms of CPU afterwards instead of 4. malloc_trim(3) is glibc's.
    """
    trim = getattr(libc.library, "malloc_trim", None)
    if trim is not None:
        trim(0)


def memory_scrub() -> None:
    """Overwrite the memory that malloc(3) holds free: what was read there, a key above all, would go to every child.

    All that is free in the heap is taken, from large pieces to small ones, and given back as zeros. Meanwhile the heap
    does not grow: what it has no room for comes from mmap(2), which is how its exhaustion is seen, and goes back there.
    glibc's only.
    """
    library = libc.library
    if getattr(library, "malloc_trim", None) is None:
        return
    word, pointer = libc.ctypes.c_size_t, libc.ctypes.c_void_p
    take, give, end_of_heap = library.malloc, library.free, library.sbrk
    take.restype, take.argtypes, give.restype, give.argtypes = pointer, (word,), None, (pointer,)
    end_of_heap.restype, end_of_heap.argtypes = pointer, (libc.ctypes.c_ssize_t,)
    library.malloc_trim(0)
    library.mallopt(M_MMAP_THRESHOLD, 0)
    end, taken = end_of_heap(0), []
    # 16 n + 8 is what a piece really has room for
    for size in [*(1 << bits for bits in range(16, 10, -1)), *range(1032, 8, -16)]:
        address = take(size)
        while address is not None and address < end:
            libc.ctypes.memset(address, 0, size)
            taken.append(address)
            address = take(size)
        give(address)
    for address in taken:
        give(address)
    library.mallopt(M_MMAP_THRESHOLD, MMAP_THRESHOLD)
    library.malloc_trim(0)


def wipe(*secrets: bytes) -> None:
    """Overwrite bytes objects that nobody will read again, so that no password stays in freed memory, which children
    inherit.

    CPython's only, and not for objects that it shares: those of one byte and of none.
    """
    if libc.library is not None and sys.implementation.name == "cpython":
        for secret in secrets:
            if len(secret) > 1:
                libc.ctypes.memset(id(secret) + bytes.__basicsize__ - 1, 0, len(secret))


def signal_default(number: int) -> None:
    """Let a signal end this process again.

    signal.signal() would spend 0.3 ms of a fresh child on its enums (copied pages).
    """
    if libc.library is not None:
        libc.library.signal(number, None)
    else:
        signal.signal(number, signal.SIG_DFL)


def no_new_privs() -> bool:
    """Whether the kernel promised that execve(2) gives nothing to this process and its children (prctl(2))."""
    try:
        return sys.platform.startswith("linux") and libc.call("prctl", PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0) == 0
    except OSError:
        return False


def landlock_confine(directory: "int | None") -> bool:
    """Whether this process may from now on touch files below `directory` (a descriptor; None: no file at all) only.

    landlock(7). Needs no_new_privs. False where the kernel has no Landlock. Files that are open already stay usable.
    """
    if not sys.platform.startswith("linux"):
        return False
    try:
        abi = libc.syscall(LANDLOCK_CREATE_RULESET, None, 0, 1)
        rights = LANDLOCK_RIGHTS_BY_ABI[min(abi, len(LANDLOCK_RIGHTS_BY_ABI) - 1)]
        handled = struct.pack("=Q", rights)
        ruleset = libc.syscall(LANDLOCK_CREATE_RULESET, handled, len(handled), 0)
        try:
            if directory is not None:
                libc.syscall(LANDLOCK_ADD_RULE, ruleset, 1, struct.pack("=Qi", rights, directory), 0)
            libc.syscall(LANDLOCK_RESTRICT_SELF, ruleset, 0)
        finally:
            os.close(ruleset)
    except OSError:
        return False
    return True


def splice_by_libc(source: int, target: int, count: int, flags: int = 0) -> int:
    """splice(2) without offsets, for Python 3.9; the same as os.splice()."""
    return libc.call("splice", source, None, target, None, libc.ctypes.c_size_t(count), flags)


SPLICE_MOVE, SPLICE_NONBLOCK = 1, 2
splice: "Callable[..., int] | None" = (
    getattr(os, "splice", None) or (splice_by_libc if hasattr(libc.library, "splice") else None))


def background() -> int:
    """Go on in the background, in a session of its own.

    The first process ends with ours: 1 when we fail before detach(this).
    """
    reader, writer = os.pipe()
    if os.fork():
        os.close(writer)
        os._exit(0 if os.read(reader, 1) else 1)
    os.close(reader)
    os.setsid()
    return writer


def detach(ready: int) -> None:
    """All that can go wrong has gone well: / as working directory, nothing on 0, 1 and 2, and the first process may
    end.
    """
    os.chdir("/")
    null = os.open(os.devnull, os.O_RDWR)
    for fd in (0, 1, 2):
        os.dup2(null, fd)
    os.close(null)
    os.write(ready, b".")
    os.close(ready)


def daemonize() -> None:
    """Go on in the background at once."""
    detach(background())

# ==== Options =====================================================================================
# One table for the daemon, one for each tool: a row knows everything about an option, and switches, long
# options, directives, defaults, --help, the README's table and the check of pureftpd.conf.example are loops
# over the rows. The manners of the command line are getopt_long(3)'s: bundles, abbreviations, options and
# arguments in any order. A configuration file is rewritten as a command line, so that one parser judges both.
# Every error is one ConfigError: the place, the reason, and what would be right.

# How a directive's argument looks in the file; the groups are what is passed on.
VALUE = r'([^"].*)'                                     # the rest of the line; quotes would belong to it
WORD = r'"([^"\s]+)"|([^"\s]\S*)'                       # one word, for which quotes are understood
TWO_FILES = r'(?:"([^"]+)"|([^"\s]\S*))\s+(?:"([^"]+)"|([^"\s]\S*))'
SPACED = r"(\d+)\s+(\d+)"
# Compat: a blank or a colon for both, as in the files of Debian's conf/; the original's parser takes one or the other
SPACED_OR_ONE = r"(\d+)(?:(?:\s+|:)(\d+))?"
COLON = r"(\d+)(?::|\s+)(\d+)"


class Directive(NamedTuple):
    """One way in which the configuration file spells an option."""
    name: str
    arg: str                        # what an error calls the argument; "" for a boolean
    pattern: str = VALUE            # its groups joined by `joint` are the option's argument ...
    prefix: str = ""                # ... behind this
    joint: str = ":"
    offered: bool = True            # False: understood only to say what to use instead


class Option(NamedTuple):
    """One row of a table of options. Nothing else in this file, the README or the tests repeats it."""
    short: str                      # "c" for -c; "" for none
    name: str                       # the directive; in lower case, the long option and the attribute of Options
    arg: str                        # what --help calls the argument; "" for a flag
    parse: Callable[[str], Any]     # text -> value; ValueError("what would be right")
    default: Any
    help: str                       # ends with the default as one would write it: "Idle minutes [15]"
    directive: Any = VALUE          # how the file spells the argument: a pattern or several Directive; "" not at all
    repeat: str = "last"            # "last" counts, "count" them, "all" (tuples are joined), "place": all of the
    #                                 command line, else all of the file

    @property
    def long(self) -> str:
        return self.name.lower()


class Options:
    """The values of one table, an attribute for each row: options.maxclientsnumber.

    `origins` says of each attribute that was given where: "-c 10" or "FILE:LINE: MaxClientsNumber 10".
    """

    def __init__(self, values: dict, origins: dict):
        self.__dict__.update(values)
        self.origins = origins

    def __getattr__(self, name: str) -> Any:            # tells type checkers that attributes are made above
        raise AttributeError(f"no option is called {name}")


class Given(NamedTuple):
    """One option as somebody gave it."""
    row: Option
    value: Any
    where: str                      # "-c 10" or "FILE:LINE: MaxClientsNumber 10"


class ConfigArgument(NamedTuple):
    """One line of a configuration file as an argument of the command line."""
    file: str
    where: str                      # "FILE:LINE: MaxClientsNumber 10"
    argument: str                   # "--maxclientsnumber=10"


def options_parse(rows, argv: list, program: str) -> tuple:
    """(Options, arguments that are no options) of `argv`, which does not hold the program's name.

    `program` is what the reader types before --help. Raises ConfigError.
    """
    given, rest = options_given(rows, argv, program)
    return options_merge(rows, given), rest


def options_given(rows, argv: list, program: str) -> tuple:
    """([Given ...] in the order of `argv`, arguments that are no options); ConfigError."""
    import getopt
    switches = {switch: row for row in rows for switch in ("-" + row.short, "--" + row.long)}
    shorts = "".join(row.short + ":" * bool(row.arg and row.short) for row in rows)
    longs = [row.long + "=" * bool(row.arg) for row in rows]
    try:
        pairs, rest = getopt.gnu_getopt(argv, shorts, longs)
    except getopt.GetoptError as error:
        raise ConfigError(option_misuse(rows, error, program)) from None
    return [option_given(switches[switch], text, f"{switch} {text}".rstrip()) for switch, text in pairs], rest


def option_misuse(rows, error, program: str) -> str:
    """What is wrong with an option that getopt refused, and the remedy."""
    is_long = "--" + error.opt in error.msg
    dashes = "--" if is_long else "-"
    switch = printable(os.fsencode(dashes + error.opt))
    names = {row.long if is_long else row.short: row for row in rows}
    fitting = [name for name in names if name == error.opt or is_long and name.startswith(error.opt)]
    if not fitting:
        return f"{switch}: unknown option{did_you_mean(error.opt, names, dashes)}; {program} --help lists them"
    if len(fitting) > 1 and error.opt not in names:
        return f"{switch}: may mean {' or '.join('--' + name for name in fitting)}: write more of it"
    row = names.get(error.opt) or names[fitting[0]]
    if row.arg:
        return f"{switch}: needs a value: {switch}{'=' if is_long else ' '}{row.arg}"
    return f"{switch}: takes no value: write {switch} alone"


def did_you_mean(word: str, names, prefix: str = "") -> str:
    """", did you mean ...?" with the name most like `word`; "" when none is, or `word` is a letter."""
    import difflib
    by_lower = {name.lower(): name for name in names}
    near = difflib.get_close_matches(word.lower(), by_lower, 1) if len(word) > 1 else []
    return f", did you mean {prefix}{by_lower[near[0]]}?" if near else ""


def option_given(row: Option, text: str, where: str) -> Given:
    """`text` judged by its row; ConfigError names `where`."""
    where = printable(os.fsencode(where))
    try:
        value = row.parse(text)
    except ValueError as error:
        raise ConfigError(f"{where}: {error}") from None
    return Given(row, value, where)


def options_merge(rows, *sources) -> Options:
    """The Options that lists of Given make, the first of them the strongest; defaults fill the rest."""
    values, origins = {}, {}
    for row in rows:
        by_source = [[given for given in source if given.row is row] for source in sources]
        strongest: list = next(filter(None, by_source), [])
        chosen = sum(by_source, []) if row.repeat in ("all", "count") else strongest
        values[row.long] = row.default
        if chosen:
            values[row.long] = option_combine(row.repeat, [given.value for given in chosen])
            origins[row.long] = strongest[-1].where
    return Options(values, origins)


def option_combine(repeat: str, values: list) -> Any:
    """The one value of an option that was given as `values`."""
    if repeat == "count":
        return len(values)
    if repeat == "last":
        return values[-1]
    return sum(values, ())


def options_help(rows, usage: str) -> str:
    """The text of --help, 100 columns wide. A plain string among the rows is a heading."""
    import textwrap
    column = min(40, max(len(option_left(row)) for row in rows if isinstance(row, Option)) + 2)
    lines = [usage]
    for row in rows:
        if not isinstance(row, Option):
            lines += ["", row]
            continue
        text = row.help
        if isinstance(row.directive, tuple) and row.directive[0].offered:
            text += f" (in a file: {', '.join(d.name for d in row.directive if d.offered)})"
        left = option_left(row).ljust(column)
        if not left.endswith("  "):
            lines.append(left)
            left = " " * column
        first, *others = textwrap.wrap(text, 100 - column, break_on_hyphens=False)
        lines += [left + first] + [" " * column + other for other in others]
    return "\n".join(lines) + "\n"


def option_left(row: Option) -> str:
    """How --help shows the switches of a row: "  -c, --maxclientsnumber=n"."""
    short = f"-{row.short}," if row.short else ""
    return f"  {short:3} --{row.long}{'=' * bool(row.arg)}{row.arg}"


# ==== Values of options ===========================================================================
# What an option's text may be. A parser returns the value, or raises ValueError with a reason that says what
# would be right; it never looks at the world: whether a file exists or a name resolves is asked where it is
# used. Numbers are decimal, ASCII, and of a size that nothing further down chokes on.


def flag(text: str) -> bool:
    """True: a flag has no value."""
    return True


def whole(low: int, high: int = 2**31 - 1, times: int = 1) -> Callable[[str], int]:
    """A parser of whole numbers from `low` to `high`, whose value is `times` the number.

    Compat: decimal only and nothing behind it; strtoul took 010 for eight and stopped at what it did not know.
    """
    def parse(text: str) -> int:
        if not is_digits(text) or not low <= int(text) <= high:
            raise ValueError(f"must be a whole number from {low} to {high}")
        return times * int(text)
    return parse


def is_digits(text: str) -> bool:
    return text.isascii() and text.isdigit() and len(text) < 20


def whole_pair(low: int, what: str, times: tuple = (1, 1)) -> Callable[[str], tuple]:
    """A parser of `what`, two numbers with a colon between, both at least `low`; each is multiplied by `times`."""
    def parse(text: str) -> tuple:
        first, _, second = text.partition(":")
        if not (is_digits(first) and is_digits(second)):
            raise ValueError(f"must be {what}, two whole numbers")
        if not low <= min(int(first), int(second)) <= max(int(first), int(second)) < 2**40:
            raise ValueError(f"both numbers must be {low} or more, and less than 2^40")
        return int(first) * times[0], int(second) * times[1]
    return parse


def parse_percentage(text: str) -> Any:
    """1 to 100, or None for 0. Compat: 0 never kept anybody from uploading ('k' in ftpd.c)."""
    return whole(0, 100)(text) or None


def parse_load(text: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = 0.0
    if not 0.0 < value < 1e6:
        raise ValueError("must be a load average above 0, as in 4 or 2.5")
    return value


def parse_path(text: str) -> str:
    """`text` as a path from / on: the daemon changes its directory, a path must not change its meaning."""
    if not text:
        raise ValueError("must be the path of a file")
    if any(ord(c) < 32 or ord(c) == 127 for c in text):
        raise ValueError("a path with control characters cannot be meant")
    return text if text.startswith("/") else os.path.join(os.getcwd(), text)


def parse_certificate(text: str) -> tuple:
    """(certificate file, key file) of "cert[,key]"; the key is in the certificate's file when none is named."""
    cert, comma, key = text.partition(",")
    if not cert or comma and not key:
        raise ValueError("must be CERTIFICATE or CERTIFICATE,KEY, both paths of PEM files")
    return parse_path(cert), parse_path(key or cert)


def parse_port_range(text: str) -> tuple:
    """(first, last) of "first:last"."""
    first, _, last = text.partition(":")
    if not (is_digits(first) and is_digits(last)):
        raise ValueError("must be two ports, first:last, as in 30000:50000")
    if not 1024 <= int(first) <= int(last) <= 65535:
        raise ValueError("the ports must be from 1024 to 65535, the lower one first")
    return int(first), int(last)


def parse_bandwidth(text: str) -> tuple:
    """(upload, download) in bytes/s of "both", "up:down", "up:" or ":down" in KB/s; 0 is no limit."""
    up, colon, down = text.partition(":")
    if not colon:
        down = up
    rates = [rate for rate in (up, down) if rate]
    if not rates or not all(map(is_digits, rates)):
        raise ValueError("must be a whole number of KB/s for both ways, or up:down, up: or :down")
    if not all(0 < int(rate) < 2**31 for rate in rates):
        raise ValueError("KB/s must be 1 or more, and less than 2^31")
    return 1024 * int(up or 0), 1024 * int(down or 0)


def parse_masks(text: str) -> tuple:
    """(files, directories) of "both", "files:dirs", "files:" or ":dirs", all octal."""
    files, colon, dirs = text.partition(":")
    if not colon:
        dirs = files
    if not (files or dirs) or not all(is_octal(mask) for mask in (files, dirs) if mask):
        raise ValueError("must be octal masks up to 777, files:directories, as in 133:022")
    return int(files or "133", 8), int(dirs or "022", 8)


def is_octal(text: str) -> bool:
    return is_digits(text) and not set(text) & set("89") and int(text, 8) <= 0o777


SYSLOG_FACILITIES = {                                   # name -> number; RFC 5424, 6.2.1, names of syslog.h
    "auth": 4, "authpriv": 10, "cron": 9, "daemon": 3, "ftp": 11, "kern": 0, "lpr": 6, "mail": 2, "news": 7,
    "security": 4, "syslog": 5, "user": 1, "uucp": 8,
    **{f"local{n}": 16 + n for n in range(8)}}


def parse_facility(text: str) -> str:
    """The facility in lower case, "none" or "stderr". Compat: the original takes any word and logs to ftp."""
    name = text.lower()
    if name not in SYSLOG_FACILITIES and name not in ("none", "stderr"):
        raise ValueError(f"must be none, stderr or a syslog facility: {', '.join(sorted(SYSLOG_FACILITIES))}")
    return name


TRANSFER_LOGS = ("clf", "stats", "w3c", "xferlog", "json")


def parse_log(text: str) -> tuple:
    """((format, path),) of "format:path", or of a path, which means clf."""
    form, _, path = ("clf", ":", text) if text.startswith("/") else text.partition(":")
    if form.lower() not in TRANSFER_LOGS or not path.startswith("/"):
        raise ValueError(f"must be FORMAT:/PATH, the format one of {', '.join(TRANSFER_LOGS)}")
    return (form.lower(), parse_path(path)),


# fmt: off
LOGIN_METHODS = {
    # method   its argument  why it is refused
    "unix":    ("",         ""),
    "pam":     ("",         ""),
    "puredb":  ("file",     ""),
    "extauth": ("socket",   ""),
    "sqlite":  ("file",     ""),
    "ldap":    ("file",     "LDAP is not offered: use pam with a module for it, or extauth"),
    "mysql":   ("file",     "MySQL is not offered: use sqlite, or extauth with a program that asks MySQL"),
    "pgsql":   ("file",     "PostgreSQL is not offered: use sqlite, or extauth with a program that asks it"),
}
# fmt: on
LOGINS = ", ".join(name + f":{arg}" * bool(arg) for name, (arg, why_not) in LOGIN_METHODS.items() if not why_not)


def parse_login(text: str) -> tuple:
    """((method, argument or None),) of "method" or "method:argument"."""
    method, _, argument = text.partition(":")
    method = method.lower()
    if method not in LOGIN_METHODS:
        raise ValueError(f"must be one of {LOGINS}")
    what, refused = LOGIN_METHODS[method]
    if refused:
        raise ValueError(refused)
    if what and not argument:
        raise ValueError(f"needs the path of its {what}: {method}:/PATH")
    if argument and not what:
        raise ValueError(f"{method} takes no argument: write {method} alone")
    return (method, parse_path(argument) if argument else None),


def parse_address(text: str) -> str:
    """An IPv4 or IPv6 address in its usual spelling, as getsockname(2) would show it."""
    for family in (socket.AF_INET, socket.AF_INET6):
        try:
            return socket.inet_ntop(family, socket.inet_pton(family, text))
        except (OSError, ValueError):                   # ValueError: a NUL, or bytes that are no UTF-8
            pass
    raise ValueError("must be an IPv4 or IPv6 address")


def parse_trusted(text: str) -> tuple:
    return parse_address(text),


def parse_host(text: str) -> str:
    """An address (an IPv6 one with or without brackets or %interface) or a host name."""
    bare = text[1:-1] if text[:1] == "[" and text[-1:] == "]" else text
    plain, percent, interface = bare.partition("%")
    try:
        return parse_address(plain) + percent + interface
    except ValueError:
        pass
    letters = set("abcdefghijklmnopqrstuvwxyz0123456789-_.")
    if not text or len(text) > 253 or not set(text.lower()) <= letters or is_digits(text.rsplit(".", 1)[-1]):
        raise ValueError("must be an IPv4 or IPv6 address or a host name")
    return text


class Network(NamedTuple):
    """The addresses of one family that share their first `bits` bits."""
    bits: int
    prefix: bytes                   # a whole address: those bits, then zeros

    def holds(self, text: str) -> bool:
        """Whether a socket's address is one of them; one that was mapped to IPv6 counts as IPv4."""
        plain = text[7:] if text.lower().startswith("::ffff:") and "." in text else text.partition("%")[0]
        try:
            return network_prefix(plain, self.bits) == self.prefix
        except ValueError:
            return False


def network_prefix(address: str, bits: int) -> bytes:
    """The first `bits` bits of an address, then zeros; 4 or 16 bytes. ValueError."""
    try:
        packed = socket.inet_pton(socket.AF_INET6 if ":" in address else socket.AF_INET, address)
    except OSError:
        raise ValueError("must be an IPv4 or IPv6 address, with /BITS for a network") from None
    spare = len(packed) * 8 - bits
    if spare < 0:
        raise ValueError(f"an address has no {bits} bits")
    return (int.from_bytes(packed, "big") >> spare << spare).to_bytes(len(packed), "big")


def parse_network(text: str) -> Network:
    """The network of "address/bits" or of a lone address; bits behind the first ones may be set."""
    base, slash, width = text.partition("/")
    bits = whole(0, 128)(width) if slash else 128 if ":" in base else 32
    return Network(bits, network_prefix(base, bits))


def one_of(*words: str) -> Callable[[str], str]:
    """A parser of one of `words`, in any case."""
    def parse(text: str) -> str:
        if text.lower() not in words:
            raise ValueError("must be " + " or ".join((", ".join(words[:-1]), words[-1])))
        return text.lower()
    return parse


parse_tls_version = one_of("1.0", "1.1", "1.2", "1.3")
parse_reuse = one_of("off", "auto", "on")


def parse_networks(text: str) -> tuple:
    """Networks, separated by commas."""
    return tuple(parse_network(item.strip()) for item in text.split(","))


def parse_passive(text: str) -> tuple:
    """((client Network or None for any, IPv4 address or host name to tell), ...) of "[network=]address,...".

    Nothing is told over IPv6 (RFC 2428, 3): addresses and networks are IPv4.
    Compat: the network, and more than one address, are ours; the original has one for everybody.
    """
    found = []
    for item in text.split(","):
        clients, equals, told = item.strip().rpartition("=")
        try:
            if ":" in item:
                raise ValueError("IPv6")
            found.append((parse_network(clients) if equals else None, parse_host(told)))
        except ValueError:
            raise ValueError("must be ADDRESS (IPv4, or a name), or NETWORK=ADDRESS for the clients of one network, "
                             "commas between several, as in 192.168.0.0/16=192.168.1.5,203.0.113.7") from None
    return tuple(found)


def parse_endpoint(text: str) -> tuple:
    """((host or None, port or None),) of "host,port", "host,", ",port", "port" or "host" to listen on.

    Compat: a lone word is a port as in the original, unless it is an address or has a dot; [host]:port too.
    """
    if text.startswith("["):
        text = text.replace("]:", "],")
    where, comma, port = text.rpartition(",")
    if not comma and ("." in port or ":" in port):
        where, port = port, ""
    try:
        if not (where or port):
            raise ValueError("neither")
        return (parse_host(where) if where else None, parse_port(port) if port else None),
    except ValueError:
        raise ValueError("must be HOST,PORT or ,PORT or PORT, as in 192.0.2.1,21; a port is a number up to 65535 "
                         "or a service") from None


def parse_port(text: str) -> int:
    """A port from its number, or from its name in /etc/services; ValueError."""
    if is_digits(text):
        return whole(0, 65535)(text)
    try:
        return socket.getservbyname(text, "tcp")
    except OSError:
        raise ValueError("no such service") from None


def parse_ciphers(text: str) -> str:
    """OpenSSL's cipher list, maybe behind "-C:" (clients need a certificate) or "-S:" (history, no effect)."""
    rest = text
    while rest[:3] in ("-S:", "-C:"):
        rest = rest[3:]
    if not rest or rest.startswith("-") or set(rest) & set(" \t\"'"):
        raise ValueError("must be a list of ciphers as OpenSSL writes it, as in HIGH:!aNULL, maybe behind -C:")
    return text


def not_offered(reason: str) -> Callable[[str], Any]:
    """A parser for what the original has and this program does not."""
    def parse(text: str) -> Any:
        raise ValueError(reason)
    return parse


# ==== Options of the daemon =======================================================================
# Every switch and directive of pure-ftpd(8), and a few of our own, by topic. What this program does not have
# is a row as well, which says what to use instead: nothing is ignored in silence.
# Compat: what the original takes in silence for something else is refused: -I 0 or -I soon (15 minutes), an
# unknown facility (ftp), -U 999 (0), digits of another base, whatever stands behind a number.

CERTIFICATE_DIRECTIVES = (
    Directive("CertFile", "file"),
    Directive("CertFileAndKey", "certificate key", TWO_FILES, joint=","),
)
LOGIN_DIRECTIVES = (
    Directive("PureDB", "file", prefix="puredb:"),
    Directive("UnixAuthentication", "", prefix="unix"),
    Directive("PAMAuthentication", "", prefix="pam"),
    Directive("ExtAuth", "socket", prefix="extauth:"),
    Directive("SQLite", "file", prefix="sqlite:"),
    Directive("LDAPConfigFile", "file", prefix="ldap:", offered=False),
    Directive("MySQLConfigFile", "file", prefix="mysql:", offered=False),
    Directive("PGSQLConfigFile", "file", prefix="pgsql:", offered=False),
)
DISK_DIRECTIVES = (Directive("MaxDiskUsage", "percent"),)
UPLOAD_DIRECTIVES = (Directive("CallUploadScript", ""),)
BONJOUR_DIRECTIVES = (Directive("Bonjour", "name", WORD, offered=False),)
DEFAULT_CERTIFICATE = ("/etc/ssl/private/pure-ftpd.pem",) * 2   # and its key
NO_BONJOUR = "Bonjour is not offered: let Avahi (a file in /etc/avahi/services) or dns-sd announce the server"

# fmt: off
OPTION_HELP = Option("h", "Help", "", flag, False, "Show this and exit.", "")

OPTIONS_BY_TOPIC = (
    "Listening and running",
    Option("S", "Bind", "[host,][port]", parse_endpoint, (),
           "Where to listen; repeatable. All addresses, port 21 (2121 if not root) when not given.", WORD, "place"),
    Option("4", "IPV4Only", "", flag, False, "Listen to IPv4 only."),
    Option("6", "IPV6Only", "", flag, False, "Listen to IPv6 only."),
    Option("B", "Daemonize", "", flag, False, "Run in the background."),
    Option("g", "PIDFile", "file", parse_path, None, "Where to write the process id."),
    Option("", "StateDir", "dir", parse_path, None, "Directory for the scoreboard and the upload pipe."),
    Option("c", "MaxClientsNumber", "n", whole(1), 50, "Clients at once; at most half the ports of -p [50]"),
    Option("C", "MaxClientsPerIP", "n", whole(1), 0, "Clients at once from one address; no limit when not given."),
    Option("I", "MaxIdleTime", "minutes", whole(1, 2**24, 60), 900, "Disconnect a client idle for so long [15]"),

    "Who may log in",
    Option("l", "Login", "method[:file]", parse_login, (),
           f"Where accounts are: {LOGINS}. Repeatable: asked in that order.", LOGIN_DIRECTIVES, "all"),
    Option("e", "AnonymousOnly", "", flag, False, "Anonymous users only."),
    Option("E", "NoAnonymous", "", flag, False, "No anonymous users."),
    Option("u", "MinUID", "uid", whole(0, 2**32 - 2), 0, "Lowest user id that may log in [0]"),
    Option("V", "TrustedIP", "address", parse_trusted, (),
           "Accounts log in at this address of ours only, others are for anonymous users; repeatable.", WORD, "all"),
    Option("y", "PerUserLimits", "users:anonymous", whole_pair(0, "users:anonymous"), None,
           "Sessions of one account, and of all anonymous users, at once; 0 is no limit.", COLON),
    Option("F", "FortunesFile", "file", parse_path, None, "Greet with a random entry of this file."),
    Option("", "BanAfter", "n", whole(0, 1000), 20,
           "Wrong passwords of one address (IPv6: /64) until it is banned; 0: neither slowed down nor banned [20]"),
    Option("", "BanTime", "minutes", whole(1, 2**20, 60), 600, "How long a ban lasts [10]"),
    Option("", "NeverBan", "network", parse_networks, (), "Networks never slowed down nor banned; commas between "
           "several; repeatable.", WORD, "all"),

    "Where users get and what they may do",
    Option("A", "ChrootEveryone", "", flag, False, "Lock all users but root into their homes."),
    Option("a", "TrustedGID", "gid", whole(0, 2**32 - 2), None, "The same, but for the members of this group."),
    Option("j", "CreateHomeDir", "", flag, False, "Create a home that is missing."),
    Option("U", "Umask", "files:dirs", parse_masks, (0o133, 0o022),
           "Permissions that new files and directories do not get, octal [133:022]", COLON),
    Option("G", "NoRename", "", flag, False, "Nobody renames."),
    Option("K", "KeepAllFiles", "", flag, False, "Nobody deletes files."),
    Option("R", "NoChmod", "", flag, False, "Nobody changes permissions."),
    Option("Z", "CustomerProof", "", flag, False, "Users cannot lock themselves out with permissions."),
    Option("x", "ProhibitDotFilesWrite", "", flag, False, "Names that begin with a dot are not written."),
    Option("X", "ProhibitDotFilesRead", "", flag, False, "Names that begin with a dot are not read either."),
    Option("D", "DisplayDotFiles", "", flag, False, "LIST shows names that begin with a dot without -a."),
    Option("L", "LimitRecursion", "files:depth", whole_pair(1, "files:depth"), (10000, 5),
           "A listing ends after so many files, and goes down so many directories [10000:5]", SPACED),

    "Anonymous users",
    Option("i", "AnonymousCantUpload", "", flag, False, "They do not upload."),
    Option("M", "AnonymousCanCreateDirs", "", flag, False, "They may create directories."),
    Option("s", "AntiWarez", "", flag, False, "They do not download what belongs to user ftp."),
    Option("z", "AllowDotFiles", "", flag, False, "They may read names that begin with a dot."),
    Option("m", "MaxLoad", "load", parse_load, None, "They do not download while the system load is higher."),

    "Uploads, quotas, ratios, bandwidth",
    Option("0", "NoTruncate", "", flag, False, "Uploads replace the old file when they are complete."),
    Option("r", "AutoRename", "", flag, False, "Uploads replace no file: they become NAME.1, NAME.2, ..."),
    Option("o", "UploadScript", "", flag, False, "Tell pure-uploadscript of uploads.", UPLOAD_DIRECTIVES),
    Option("k", "MaxDiskUsagePct", "percent", parse_percentage, None,
           "No uploads while the disk is fuller than this.", DISK_DIRECTIVES),
    Option("n", "Quota", "files:MB", whole_pair(0, "files:MB", (1, 2**20)), None,
           "Files and megabytes that an account may keep.", COLON),
    Option("q", "AnonymousRatio", "up:down", whole_pair(1, "up:down"), None,
           "1:10 lets anonymous users download ten bytes for one uploaded.", SPACED),
    Option("Q", "UserRatio", "up:down", whole_pair(1, "up:down"), None, "The same for everybody.", SPACED),
    Option("t", "AnonymousBandwidth", "[up:]down", parse_bandwidth, None,
           "KB/s of an anonymous session; one number is for both ways.", SPACED_OR_ONE),
    Option("T", "UserBandwidth", "[up:]down", parse_bandwidth, None, "The same for every session.", SPACED_OR_ONE),

    "Data connections",
    Option("p", "PassivePortRange", "first:last", parse_port_range, None, "Ports for passive transfers.", SPACED),
    Option("P", "ForcePassiveIP", "[net=]address", parse_passive, (),
           "Address or name that clients (of this network) are told for passive transfers; repeatable.", WORD, "all"),
    Option("N", "NATmode", "", flag, False, "Active transfers only."),
    Option("w", "AllowUserFXP", "", flag, False, "Accounts may transfer between two servers."),
    Option("W", "AllowAnonymousFXP", "", flag, False, "Everybody may: dangerous on open networks."),
    Option("b", "BrokenClientsCompatibility", "", flag, False, "Concessions to broken clients and firewalls."),

    "Encryption",
    Option("Y", "TLS", "level", whole(0, 3), 0, "0: none, 1: for who asks, 2: required, 3: for data too [0]"),
    Option("2", "CertFile", "cert[,key]", parse_certificate, DEFAULT_CERTIFICATE,
           f"Certificate and key, PEM [{DEFAULT_CERTIFICATE[0]}]", CERTIFICATE_DIRECTIVES),
    Option("3", "ExtCert", "dir", parse_path, None,
           "Directory of certificates with key, NAME.pem for clients that ask for host NAME."),
    Option("", "TLSMinVersion", "version", parse_tls_version, "1.2", "Lowest version of TLS: 1.0, 1.1, 1.2 or 1.3 [1.2]"),
    Option("", "TLSBind", "[host,][port]", parse_endpoint, (), "Where to expect TLS without AUTH TLS (implicit FTPS, port "
           "990); repeatable.", WORD, "place"),
    Option("", "TLSSessionReuse", "off|auto|on", parse_reuse, "auto", "Data connections must resume the TLS session of the "
           "control connection: never, once the client has done so, always [auto]"),
    Option("", "TLSLooseClose", "", flag, False, "Take uploads for complete that end without close_notify."),
    Option("", "TLSAuthSSL", "", flag, False, "Understand AUTH SSL as AUTH TLS."),
    Option("", "TLSSelfSigned", "", flag, False, "Make a self-signed certificate when there is none."),
    Option("J", "TLSCipherSuite", "ciphers", parse_ciphers, None,
           "Ciphers as OpenSSL lists them; with -C: before them clients need a certificate.", WORD),

    "Logs",
    Option("f", "SyslogFacility", "facility", parse_facility, "ftp", "Where to log: this, or stderr, or none [ftp]"),
    Option("1", "LogPID", "", flag, False, "Write the process id into each line."),
    Option("d", "VerboseLog", "", flag, 0, "Log all commands; given twice, replies too.", repeat="count"),
    Option("H", "DontResolve", "", flag, False, "Log addresses, never ask for host names."),
    Option("O", "AltLog", "[format:]file", parse_log, (),
           f"Log of transfers: {', '.join(TRANSFER_LOGS)}; repeatable.", repeat="all"),

    "Other",
    Option("v", "Bonjour", "name", not_offered(NO_BONJOUR), None, "Not offered.", BONJOUR_DIRECTIVES),
    OPTION_HELP,
    Option("", "Version", "", flag, False, "Show the version and exit.", ""),
)
# fmt: on
OPTIONS = tuple(row for row in OPTIONS_BY_TOPIC if isinstance(row, Option))


def option_directives(row: Option) -> tuple:
    """The Directive with which the configuration file spells `row`; () for what only switches know."""
    if isinstance(row.directive, tuple):
        return row.directive
    spaced = row.arg.replace(":", " ") if row.directive in (SPACED, SPACED_OR_ONE) else row.arg
    return (Directive(row.name, spaced, row.directive),) if row.directive else ()


# ==== Configuration file ==========================================================================
# pure-ftpd.conf: "Name value", "Name = value" or "Name : value" on each line, names and booleans in any case,
# "#" only as the first character. Each line becomes an argument of the command line, which options_read
# judges together with the real ones. What the command line says wins over what the file says; lists (-l, -O,
# -V, -P) have the items of both, those of the command line first; -d counts both. Errors name FILE:LINE.

CONFIG_FILES_DEEP = 16                                  # Include in Include ..., the first file counted


def options_from_file(path: str) -> list:
    """A ConfigArgument for each line of the file and of those it includes that says something.

    The values are judged by who parses the arguments. Raises ConfigError with FILE:LINE.
    """
    directives = {d.name.lower(): (row, d) for row in OPTIONS for d in option_directives(row)}
    try:
        path = parse_path(path)
    except ValueError as error:
        raise ConfigError(f"configuration file {path!r}: {error}") from None
    return list(config_arguments(path, directives, CONFIG_FILES_DEEP))


def config_arguments(path: str, directives: dict, deep: int):
    """Yield the ConfigArguments of a file; `deep` files may be open at once from here on."""
    for number, line in enumerate(config_lines(path), 1):
        line = line.strip()
        if not line or line.startswith("#"):
            continue
        where = f"{path}:{number}: {line}"
        try:
            name, text = config_split(line, directives)
            if name.lower() == "include":
                yield from config_include(path, text, directives, deep - 1)
                continue
            row, directive = directives[name.lower()]
            argument = config_argument(row, directive, text)
        except ValueError as error:
            raise ConfigError(printable(os.fsencode(f"{where}: {error}"))) from None
        if argument:
            yield ConfigArgument(path, where, argument)


def config_lines(path: str) -> list:
    """The lines of the file; bytes that are no UTF-8 are kept as os.fsdecode keeps them."""
    try:
        with open(path, encoding="utf-8-sig", errors="surrogateescape") as file:
            return file.readlines()
    except OSError as error:
        raise ConfigError(f"{printable(os.fsencode(path))}: cannot read the configuration file: "
                          f"{error.strerror}") from None


def config_split(line: str, directives: dict) -> tuple:
    """(name, argument text) of "Name value", "Name = value" or "Name: value"; ValueError."""
    import re
    name = re.split(r"[\s=:]", line, maxsplit=1)[0]
    known = directives.get(name.lower())
    if not known and name.lower() != "include":
        raise ValueError(config_unknown(name, directives))
    wanted = config_form(known[1]) if known else "Include FILE"
    match = re.fullmatch(r"(?:\s*[=:]\s*|\s+)([^\s=:].*)", line[len(name):])
    if not match:
        raise ValueError(f"write it as {wanted}")
    if re.search(r"\s#", match[1]):
        raise ValueError("a comment must stand on a line of its own")       # Compat: in paths, too
    return name, match[1]


def config_unknown(name: str, directives: dict) -> str:
    """Why `name` is no directive, and what may have been meant."""
    for row, _ in directives.values():
        if row.long == name.lower():
            names = [d.name for d in option_directives(row) if d.offered]
            return f"unknown directive: in a file it is {' or '.join(names)}"
    names = [directive.name for row, directive in directives.values()] + ["Include"]
    return f"unknown directive{did_you_mean(name, names) or '; pureftpd.conf.example has them all'}"


def config_form(directive: Directive) -> str:
    return f"{directive.name} {directive.arg or 'yes|no'}"


def config_argument(row: Option, directive: Directive, text: str) -> str:
    """The argument of the command line that means the same; "" for a boolean that is off. ValueError."""
    import re
    if not directive.arg:
        if not re.fullmatch(r"(?i:yes|on|true|1|no|off|false|0)", text):
            raise ValueError("must be yes, on, true, 1, no, off, false or 0, and nothing after it")
        if text.lower() in ("no", "off", "false", "0"):
            return ""
        return f"--{row.long}={directive.prefix}" if row.arg else f"--{row.long}"
    match = re.fullmatch(directive.pattern, text)
    if not match and directive.pattern == VALUE:
        raise ValueError("quotes would be a part of the value here: write it without them")
    if not match:
        blanks = ", without blanks" if directive.pattern == WORD else ""
        raise ValueError(f"write it as {config_form(directive)}{blanks}")
    return f"--{row.long}={directive.prefix}{directive.joint.join(filter(None, match.groups()))}"


def config_include(path: str, text: str, directives: dict, deep: int):
    """Yield the ConfigArguments of an included file; none when there is no such file.

    Compat: a relative name is looked for beside the file that includes it, not in the directory that the
    daemon happens to be started in.
    """
    if text.startswith('"'):
        raise ValueError("quotes would be a part of the name here: write it without them")
    included = os.path.join(os.path.dirname(path), text)
    if not os.path.exists(included):
        return
    if not deep:
        raise ValueError(f"more than {CONFIG_FILES_DEEP} files deep: does a file include itself?")
    yield from config_arguments(included, directives, deep)


def options_read(argv: list) -> Options:
    """The daemon's Options from its arguments and the configuration file that they may name; ConfigError.

    Three more attributes: `configfile` (path or None), `configfiles` (all that were read) and `origins`. With
    `help` or `version` nothing else has been looked at.
    """
    typed, rest = options_given(OPTIONS, argv, "pure-ftpd")
    options = options_merge(OPTIONS, typed)
    if options.help or options.version:
        return options
    if len(rest) > 1:
        raise ConfigError(f"{printable(os.fsencode(rest[1]))}: stray argument: besides options there may be one "
                          "configuration file and nothing else")
    lines = options_from_file(rest[0]) if rest else []
    filed = [given for line in lines for given in config_given(line)]
    options = options_merge(OPTIONS, typed, filed)
    path = parse_path(rest[0]) if rest else None
    files = dict.fromkeys([path] * len(rest) + [line.file for line in lines])
    options.__dict__.update(configfile=path, configfiles=tuple(files))
    options_check(options)
    return options


def config_given(line: ConfigArgument) -> list:
    """The Given of one line of a file, judged as on the command line; ConfigError names the line."""
    name, equals, text = line.argument[2:].partition("=")
    return [option_given(row, text, line.where) for row in OPTIONS if row.long == name]


def options_check(options: Options):
    """Refuse what makes no sense together; ConfigError names the switch, or the line of the file."""
    def refuse(name: str, reason: str):
        raise ConfigError(f"{options.origins[name]}: {reason}")
    if options.ipv4only and options.ipv6only:
        refuse("ipv6only", "with -4 (IPV4Only) nothing is left to listen to: give one of them, or none for both")
    if options.anonymousonly and options.noanonymous:
        refuse("noanonymous", "with -e (AnonymousOnly) nobody is left who may log in: give one of them")
    if options.daemonize and options.syslogfacility == "stderr":
        refuse("syslogfacility", "with -B (Daemonize) nobody sees stderr: log to syslog, or stay in the foreground")
    hosts = [where for where, port in options.bind if where]
    if options.ipv4only and any(":" in where for where in hosts):
        refuse("bind", "an IPv6 address cannot be listened to with -4 (IPV4Only)")
    if options.ipv6only and any(where.replace(".", "").isdigit() for where in hosts):
        refuse("bind", "an IPv4 address cannot be listened to with -6 (IPV6Only)")

# ==== Log =========================================================================================
# One line per event: `(user@host) [LEVEL] text`, to syslog by its socket, or to stderr. The socket is connected
# before any chroot and shared by all processes: a datagram is a line, so lines never mix. When syslogd is started again PRIV
# connects anew before its next fork, and sends SERVER the new socket; sessions that run are silent then. Nothing here waits: what
# syslogd does not take at once is dropped, and the next line that gets through tells how many were lost. Every text
# is made printable here, so that no name a client sends can forge a line.

SYSLOG_SOCKETS = ("/dev/log", "/var/run/syslog", "/var/run/log")
# fmt: off
LOG_LEVELS = {              # name in the line: priority of syslog(3)
    "ERROR":   3,
    "WARNING": 4,
    "NOTICE":  5,
    "INFO":    6,
    "DEBUG":   7,
}
# fmt: on


def log_text(text: str) -> str:
    """`text` with every character that is not printable (line breaks above all) as \\xNN, \\n or \\uNNNN.

    ascii() needs no codec: those are modules, and after a chroot none can be loaded any more.
    """
    if text.isprintable():
        return text
    return "".join(c if c.isprintable() else ascii(c)[1:-1] if not "\udc80" <= c <= "\udcff" else "\\x%02x" % (ord(c) - 0xDC00)
                   for c in text)


def syslogd_there() -> Any:
    """(path, what is another one's when syslogd has been started again) of its socket; None when there is none."""
    for path in SYSLOG_SOCKETS:
        try:
            st = os.stat(path)
        except OSError:
            continue
        return path, st.st_dev, st.st_ino, st.st_ctime_ns
    return None


class Log:
    """Where one process writes its lines, and the `(user@host)` that it puts before them."""

    def __init__(self, facility: str = "stderr", with_pid: bool = False, verbose: int = 0) -> None:
        self.facility, self.with_pid, self.verbose = facility, with_pid, verbose
        self.who = ""                                   # "user@host", "?@host"; "" for the server itself
        self.lost = 0                                   # lines that syslogd did not take
        self.socket: "socket.socket | None" = None      # None: no syslogd listens, and stderr serves instead
        self.syslogd: Any = None                        # whose socket that is, see syslogd_there()
        self.reconnect()

    def reconnect(self) -> bool:
        """Connect to the syslogd there is, for a process that sees the system's own directories: whether it is another one."""
        there = syslogd_there() if self.facility not in ("none", "stderr") else None
        if there is None or there == self.syslogd:
            return False
        sock = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
        try:
            sock.connect(there[0])
        except OSError:
            sock.close()
            return False
        self.adopt(sock)
        self.syslogd = there
        return True

    def adopt(self, sock: socket.socket) -> None:
        """Write to that socket from now on."""
        if self.socket is not None:
            self.socket.close()
        self.socket = sock

    @property
    def silent(self) -> bool:
        """Whether nobody reads what is written, so that it need not be put together."""
        return self.facility == "none"

    def write(self, level: str, text: str) -> None:
        if self.facility == "none":
            return
        who = f"({self.who}) " if self.who else ""
        # What a client says must not look like the beginning of a line to fail2ban, whose filters search: "x@HOST)
        # [WARNING] ..."
        line = log_text(f"{who}[{level}] " + text.replace(") [", ")\\x20["))
        if self.lost:
            line += f" ({self.lost} lines before this one were lost)"
        if self.write_line(LOG_LEVELS[level], line):
            self.lost = 0
        else:
            self.lost += 1

    def write_line(self, priority: int, line: str) -> bool:
        """Whether somebody took the line."""
        tag = f"pure-ftpd[{os.getpid()}]: " if self.with_pid else "pure-ftpd: "
        try:
            if self.socket is None:
                if not select.select([], [2], [], 0)[1]:
                    return False                            # a full pipe: its reader has stopped
                stamp = time.strftime("%Y-%m-%d %H:%M:%S ")
                os.write(2, (stamp + tag + line + "\n").encode("utf-8", "backslashreplace"))
            else:
                stamp = time.strftime("%b %d %H:%M:%S ")
                head = f"<{SYSLOG_FACILITIES[self.facility] * 8 + priority}>{stamp}{tag}"
                self.socket.send((head + line).encode("utf-8", "backslashreplace"), socket.MSG_DONTWAIT)
        except OSError:
            return False
        return True

    def error(self, text: str) -> None:
        self.write("ERROR", text)

    def warning(self, text: str) -> None:
        self.write("WARNING", text)

    def notice(self, text: str) -> None:
        self.write("NOTICE", text)

    def info(self, text: str) -> None:
        self.write("INFO", text)

    def debug(self, text: str) -> None:
        if self.verbose:
            self.write("DEBUG", text)

# ==== Password hashes =============================================================================
# Every kind of hash that Pure-FTPd's databases hold: Argon2 (RFC 9106) and scrypt (RFC 7914; libsodium's "$7$"
# form) are computed by what is installed, crypt(5)'s kinds by libcrypt, and three of those ($1$ $5$ $6$) by this
# file where libcrypt is missing. A hash that cannot be checked here raises HashUnsupported: the log says what to
# install, and nobody comes in.
#
# Memory decides what is loaded when (Python 3.11, proportional set size): OpenSSL's hashlib 3.1 MB, the package
# argon2 2.4 MB, its C part alone 0.4 MB, libsodium through ctypes 0.2 MB more than ctypes itself, libcrypt 0.05 MB
# more. So only libcrypt, whose hashes may take no longer than loading it, is loaded before the fork
# (passwords_preload); the others cost half a second on purpose: there the login child can spare the 4 ms.

HASH_MEMORY_MAX = 1 << 30           # bytes that one hash may ask for; more is taken for an attack or a slip
HASH_WORK_MAX = 1 << 36             # bytes it may pass over: 15 s of Argon2, two minutes of scrypt
HASH_LANES_MAX = 64                 # threads that it may start
CRYPT_ROUNDS_MAX = 20_000_000       # `rounds=` that it may have: 5 s of libcrypt, 20 s of crypt_in_python
BCRYPT_COST_MAX = 18                # logarithm of bcrypt's rounds: 15 s
AUTH_MEMORY = 64 << 20              # pure-pw -M: bytes for all concurrent logins together
AUTH_MEMORY_MIN = 8192              # bytes for one of them
AUTH_LOGINS = 8                     # pure-pw -C: concurrent logins to expect
AUTH_CORES = 8                      # of which this many run at the same time
AUTH_TIME, AUTH_TIME_MIN = 1.0, 0.25                            # seconds that checking a password may take
CRYPT64 = "./0123456789ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz"
HASH_SAMPLE = "$6$" + "." * 16 + "$" + "." * 86                # what /etc/shadow holds most often; no password fits it
LIBSODIUM = ("libsodium.so.23", "libsodium.so.26", "libsodium.so", "libsodium.dylib")
LIBARGON2 = ("libargon2.so.1", "libargon2.so.0", "libargon2.so", "libargon2.dylib")
LIBCRYPT = ("libcrypt.so.1", "libcrypt.so.2", "libcrypt.so.5", "libcrypt.so", None)      # None: in libc (macOS, musl)


class HashUnsupported(Exception):
    """This hash cannot be checked here; the text says why and what to install, and holds nothing of the hash."""


def hash_kind(hashed: str) -> str:
    """The part of `hashed` that names its kind, fit for a log: "$2b$"; "DES" for what has no such part."""
    return hashed[:hashed.index("$", 1) + 1][:16] if hashed.startswith("$") else "DES"


def same_digest(one: bytes, other: bytes) -> bool:
    """Whether both are equal, in a time that tells nothing of where they differ.

    hmac.compare_digest is this very function, and OpenSSL besides.
    """
    from _operator import _compare_digest
    return _compare_digest(one, other)


def hash_limits(hashed: str, memory: int, work: int) -> None:
    """HashUnsupported when a hash asks for more memory, or for more bytes to pass over, than a login may cost."""
    if memory > HASH_MEMORY_MAX or work > HASH_WORK_MAX:
        raise HashUnsupported(f"a {hash_kind(hashed)} hash asks for {memory >> 20} MiB of memory and passes over "
                              f"{work >> 20} MiB: the limits are {HASH_MEMORY_MAX >> 20} and {HASH_WORK_MAX >> 20}")


def shared_library(names: "tuple[str | None, ...]", *functions: str) -> Any:
    """The first of the C libraries `names` that has all `functions`; ImportError when there is none."""
    import ctypes
    for name in names:
        try:
            library = ctypes.CDLL(name)
        except OSError:
            continue
        if all(hasattr(library, function) for function in functions):
            return library
    raise ImportError("no " + "/".join(str(name) for name in names))


# Three libraries compute Argon2. Each of these functions answers (verify, make):
# verify(hashed, password) -> bool, and make(password, passes, KiB of memory) -> hashed.

def argon2_from_cffi() -> "tuple[Callable, Callable]":
    """By the C part of argon2-cffi; its Python part costs six times the memory and adds nothing for us."""
    from _argon2_cffi_bindings import ffi, lib                  # type: ignore
    return argon2_reference(lib, ffi.from_buffer)


def argon2_from_libargon2() -> "tuple[Callable, Callable]":
    """By the reference implementation's library (Debian: libargon2-1)."""
    import ctypes
    lib = shared_library(LIBARGON2, "argon2_hash", "argon2_verify")
    text, size, u32 = ctypes.c_char_p, ctypes.c_size_t, ctypes.c_uint32
    lib.argon2_verify.argtypes = [text, text, size, ctypes.c_int]
    lib.argon2_hash.argtypes = [u32, u32, u32, text, size, text, size, text, size, text, size, ctypes.c_int, u32]
    return argon2_reference(lib, lambda area: (ctypes.c_char * len(area)).from_buffer(area))


def argon2_reference(lib: Any, pointer: "Callable[[bytearray], Any]") -> "tuple[Callable, Callable]":
    """By a library with the functions of argon2.h; `pointer` makes C's view of a bytearray."""
    def verify(hashed: bytes, password: bytes) -> bool:
        kind = 2 if hashed.startswith(b"$argon2id$") else 1
        code = lib.argon2_verify(hashed, password, len(password), kind)
        if code not in (0, -35):                                    # ARGON2_OK, ARGON2_VERIFY_MISMATCH
            raise HashUnsupported(f"a {hash_kind(hashed.decode())} hash cannot be checked: libargon2's error {code}")
        return code == 0

    def make(password: bytes, passes: int, kib: int) -> bytes:
        encoded, digest = bytearray(128), bytearray(32)
        code = lib.argon2_hash(passes, kib, 1, password, len(password), os.urandom(16), 16, pointer(digest), 32,
                               pointer(encoded), len(encoded), 2, 0x13)
        if code:
            raise HashUnsupported(f"cannot hash with Argon2 ({kib} KiB, {passes} passes): libargon2's error {code}")
        return bytes(encoded).rstrip(b"\0")
    return verify, make


def argon2_from_libsodium() -> "tuple[Callable, Callable]":
    """By libsodium, which the original uses."""
    import ctypes
    lib = shared_library(LIBSODIUM, "sodium_init", "crypto_pwhash_str_alg", "crypto_pwhash_str_verify")
    if lib.sodium_init() < 0:
        raise ImportError("libsodium does not start")
    u64 = ctypes.c_ulonglong
    lib.crypto_pwhash_str_verify.argtypes = [ctypes.c_char_p, ctypes.c_char_p, u64]
    lib.crypto_pwhash_str_alg.argtypes = [ctypes.c_char_p, ctypes.c_char_p, u64, u64, ctypes.c_size_t, ctypes.c_int]

    def verify(hashed: bytes, password: bytes) -> bool:
        return lib.crypto_pwhash_str_verify(hashed, password, len(password)) == 0

    def make(password: bytes, passes: int, kib: int) -> bytes:
        encoded = ctypes.create_string_buffer(128)                  # crypto_pwhash_STRBYTES
        if lib.crypto_pwhash_str_alg(encoded, password, len(password), passes, kib << 10, 2):
            raise HashUnsupported(f"libsodium cannot hash with Argon2 ({kib} KiB, {passes} passes)")
        return encoded.value
    return verify, make


def argon2_functions() -> "tuple[Callable, Callable]":
    """(verify, make) of the first Argon2 library that is here; HashUnsupported when there is none."""
    for maker in (argon2_from_cffi, argon2_from_libsodium, argon2_from_libargon2):
        try:
            return maker()
        except ImportError:
            continue
    raise HashUnsupported("Argon2 hashes need the Python package argon2-cffi, or the library libsodium or libargon2: "
                          "install one of them (pip install argon2-cffi, apt install libsodium23)")


def argon2_verify(password: bytes, hashed: str) -> bool:
    """$argon2id$ and $argon2i$, in the encoding of the reference implementation."""
    try:
        costs = dict(item.split("=") for item in hashed.split("$")[-3].split(","))
        kib, passes, lanes = int(costs["m"]), int(costs["t"]), int(costs["p"])
    except (ValueError, KeyError, IndexError):
        raise HashUnsupported(f"a {hash_kind(hashed)} hash is malformed") from None
    if lanes > HASH_LANES_MAX:
        raise HashUnsupported(f"a {hash_kind(hashed)} hash asks for {lanes} threads: the limit is {HASH_LANES_MAX}")
    hash_limits(hashed, kib << 10, (kib << 10) * passes)
    verify, _ = argon2_functions()
    return verify(hashed.encode(), password)


def argon2_make(password: bytes, passes: int, memory: int) -> str:
    """An $argon2id$ hash that takes `memory` bytes, passed over `passes` times."""
    _, make = argon2_functions()
    return make(password, passes, memory >> 10).decode()


def crypt64(value: int, characters: int) -> str:
    """`value` in crypt(3)'s base 64, least significant six bits first."""
    return "".join(CRYPT64[value >> 6 * i & 63] for i in range(characters))


def crypt64_bytes(data: bytes) -> str:
    """`data` as scrypt's "$7$" writes salts and hashes: three bytes, little endian, are four characters."""
    return "".join(crypt64(int.from_bytes(data[i:i + 3], "little"), (len(data[i:i + 3]) * 8 + 5) // 6)
                   for i in range(0, len(data), 3))


def scrypt_compute(password: bytes, setting: str) -> str:
    """The hash of `password` under `setting`: "$7$", log2 of N (one digit), r and p (five digits each), the salt.

    The salt is the text itself, as in libsodium. ValueError or MemoryError for values that scrypt cannot use,
    ImportError where hashlib has no scrypt.
    """
    from hashlib import scrypt
    numbers = [CRYPT64.index(c) for c in setting[3:14]]
    r, p = (sum(n << 6 * i for i, n in enumerate(five)) for five in (numbers[1:6], numbers[6:11]))
    n = 1 << numbers[0]
    hash_limits(setting, 128 * r * max(n, p), 128 * r * n * p)
    digest = scrypt(password, salt=setting[14:].encode(), n=n, r=r, p=p, dklen=32, maxmem=128 * r * (n + p + 8) + 8192)
    return setting + "$" + crypt64_bytes(digest)


def scrypt_verify(password: bytes, hashed: str) -> bool:
    """$7$, as libsodium's crypto_pwhash_scryptsalsa208sha256_str and libxcrypt write it."""
    try:
        computed = scrypt_compute(password, hashed.rpartition("$")[0])
    except ImportError:
        return crypt_verify(password, hashed)
    except (ValueError, MemoryError, IndexError):
        raise HashUnsupported("a $7$ hash is malformed, or asks for more memory than there is") from None
    return same_digest(computed.encode(), hashed.encode())


def scrypt_make(password: bytes, passes: int, memory: int) -> str:
    """A $7$ hash that takes `memory` bytes (a power of two, at least 1 MiB), `passes` times (scrypt's p)."""
    log2_n = max(10, (memory // 1024).bit_length() - 1)             # 1 KiB each, with r = 8
    setting = "$7$" + CRYPT64[log2_n] + crypt64(8, 5) + crypt64(passes, 5) + crypt64_bytes(os.urandom(32))
    try:
        return scrypt_compute(password, setting)
    except ImportError:
        raise HashUnsupported("to hash passwords, install Argon2 (pip install argon2-cffi) or a Python whose hashlib "
                              "has scrypt") from None


@lru_cache(maxsize=4)
def crypt_from_library(names: "tuple[str | None, ...]") -> Any:
    """crypt(3) of the first of these libraries that has it, None without. Looked up once: that costs a login 0.2 ms."""
    try:
        crypt = shared_library(names, "crypt").crypt
    except ImportError:
        return None
    from ctypes import c_char_p
    crypt.restype, crypt.argtypes = c_char_p, [c_char_p, c_char_p]
    return crypt


def crypt_function() -> "Callable[[bytes, bytes], bytes | None] | None":
    """crypt(3) on bytes, from libcrypt or else from the module that Python had until 3.12; None without either."""
    crypt = crypt_from_library(LIBCRYPT)
    if crypt is not None:
        return crypt
    try:
        from _crypt import crypt as module_crypt    # type: ignore
    except ImportError:
        return None
    return lambda password, setting: (module_crypt(password.decode(), setting.decode()) or "").encode()


def crypt_limits(hashed: str) -> None:
    """HashUnsupported when a hash of crypt(5) asks for more time than a login may cost; crypt(3) judges the rest."""
    _, kind, cost = hashed.split("$")[:3]
    highest = BCRYPT_COST_MAX if kind.startswith("2") else CRYPT_ROUNDS_MAX
    number = cost if kind.startswith("2") else cost.partition("rounds=")[2]
    if number.isdigit() and (len(number) > 9 or int(number) > highest):
        raise HashUnsupported(f"a {hash_kind(hashed)} hash asks for {number[:20]} rounds: the limit is {highest}")


def crypt_verify(password: bytes, hashed: str) -> bool:
    """Any hash of crypt(5). HashUnsupported when crypt(3) answers a failure token, or a hash of another kind."""
    kind = hash_kind(hashed)
    if kind != "DES":
        crypt_limits(hashed)
    beginning = kind.encode() if kind != "DES" else hashed[:2].encode()
    for crypt in (crypt_function(), crypt_in_python):
        try:
            computed = crypt(password, hashed.encode()) if crypt else None
        except (ValueError, OSError):               # a password that is no UTF-8, or a bad hash, for the module
            continue
        if computed and computed.startswith(beginning):
            return same_digest(computed, hashed.encode())
    raise HashUnsupported(f"a {kind} hash is malformed, or of a kind that crypt(3) does not know here: install "
                          "libxcrypt (libcrypt.so), or give the user a new password with pw passwd")


class CryptKind(NamedTuple):
    """One of the hashes of crypt(5) that are made of one digest, repeated in an order with a period of 42."""
    digest: str                     # its name in hashlib
    salt: int                       # the longest salt, bytes
    rounds: int                     # when the hash does not say
    order: tuple                    # which bytes of the digest become each group of characters, most significant first


# fmt: off
CRYPT_KINDS = {
    b"1": CryptKind("md5",     8, 1000, tuple((i, i + 6, i + 12) for i in range(4)) + ((4, 10, 5), (11,))),
    b"5": CryptKind("sha256", 16, 5000, tuple(((i, i + 10, i + 20) * 2)[-i % 3:][:3] for i in range(10)) + ((31, 30),)),
    b"6": CryptKind("sha512", 16, 5000, tuple(((i, i + 21, i + 42) * 2)[i % 3:][:3] for i in range(21)) + ((63,),)),
}
# fmt: on


def digest_function(name: str) -> "Callable[..., Any]":
    """hashlib's `name`, from the module that is inside Python where there is one: half the time for short messages."""
    for module in ("_" + name, "_sha2"):
        try:
            return getattr(__import__(module), name)
        except (ImportError, AttributeError):
            continue
    import hashlib
    return getattr(hashlib, name)


def crypt_in_python(password: bytes, hashed: bytes) -> "bytes | None":
    """crypt(3) for $1$, $5$ and $6$; None for other hashes, and for `rounds=` that crypt(5) does not allow.

    After the public descriptions of MD5-crypt (P.-H. Kamp) and of "Unix crypt using SHA-256 and SHA-512" (U. Drepper).
    """
    fields = hashed.split(b"$")
    kind = CRYPT_KINDS.get(fields[1] if len(fields) > 2 else b"")
    if kind is None:
        return None
    rounds, setting = kind.rounds, b"$" + fields[1] + b"$"
    if fields[1] != b"1" and fields[2].startswith(b"rounds="):
        number = fields.pop(2)[7:]
        if len(fields) < 3 or not number.isdigit() or number[:1] == b"0" or not 1000 <= int(number) <= 999999999:
            return None
        rounds, setting = int(number), setting + b"rounds=" + number + b"$"
    salt = fields[2][:kind.salt]
    digest = crypt_digest(kind, password, salt, rounds)
    characters = "".join(crypt64(int.from_bytes(bytes(digest[i] for i in group), "big"), (len(group) * 8 + 5) // 6)
                         for group in kind.order)
    return setting + salt + b"$" + characters.encode()


def crypt_digest(kind: CryptKind, password: bytes, salt: bytes, rounds: int) -> bytes:
    """The digest behind a $1$, $5$ or $6$ hash."""
    function = digest_function(kind.digest)

    def stretched(data: bytes, length: int) -> bytes:
        return (data * (length // len(data) + 1))[:length]

    def mixed(bits: int, one: bytes, zero: bytes) -> bytes:
        return b"".join(one if bits >> i & 1 else zero for i in range(bits.bit_length()))

    size = len(password)
    alternate = function(password + salt + password).digest()
    if kind.digest == "md5":
        digest = function(password + b"$1$" + salt + stretched(alternate, size)
                          + mixed(size, b"\0", password[:1])).digest()
    else:
        digest = function(password + salt + stretched(alternate, size) + mixed(size, alternate, password)).digest()
        password = stretched(function(password * size).digest(), size)
        salt = stretched(function(salt * (16 + digest[0])).digest(), len(salt))
    middles = [(salt if i % 3 else b"") + (password if i % 7 else b"") for i in range(42)]
    steps = [(middles[i] + password, password + middles[i + 1]) for i in range(0, 42, 2)]
    for start in range(0, rounds, 42):
        for after, before in steps[:(rounds - start) // 2]:
            digest = function(before + function(digest + after).digest()).digest()
    if rounds % 2:
        digest = function(digest + steps[rounds % 42 // 2][0]).digest()
    return digest


HASH_CHECKS = (("$argon2id$", argon2_verify), ("$argon2i$", argon2_verify), ("$7$", scrypt_verify), ("$", crypt_verify))


def hash_check(hashed: str) -> "Callable[[bytes, str], bool] | None":
    """The function that compares a password with `hashed`; None when that is no hash, so that no password ever fits.

    No hash: a locked account ("*", "!..."), nothing, clear text, LDAP's {SHA}.
    """
    old = hashed[1:] if len(hashed) == 20 and hashed[0] == "_" else hashed * (len(hashed) == 13)
    if old and set(CRYPT64).issuperset(old):
        return crypt_verify                                         # crypt(5): bsdicrypt, descrypt
    if hashed.count("$") < 3:
        return None                                                 # clear text, even when it begins with one
    return next((check for prefix, check in HASH_CHECKS if hashed.startswith(prefix)), None)


def password_usable(hashed: str) -> bool:
    """Whether `hashed` is a hash at all: checking it costs time, and some password may fit."""
    return hash_check(hashed) is not None


def password_verify(password: bytes, hashed: str) -> bool:
    """Whether `password` is the one behind `hashed`; HashUnsupported when that cannot be found out here."""
    if 0 in password or not hashed.isascii() or not hashed.isprintable():
        return False                                # C's strings end at a zero, and scrypt pads passwords with zeros
    check = hash_check(hashed)
    return check is not None and check(password, hashed)


def password_waste(password: bytes, sample: str = "") -> None:
    """Take as long as a wrong password of a user whose hash is `sample` takes, to hide that there is no such user.

    So the back end hands over the hash of a user that it does know (puredb_sample); without one, HASH_SAMPLE serves.
    """
    try:
        password_verify(password, sample if password_usable(sample) else HASH_SAMPLE)
    except HashUnsupported:
        pass


def passwords_preload(samples: "tuple[str, ...]" = (HASH_SAMPLE,)) -> None:
    """Load before the fork what hashes like `samples` need, where a login would notice the loading (see above)."""
    if any(hash_check(sample) is crypt_verify for sample in samples):
        crypt_function()


def password_hash(password: bytes, passes: int, memory: int) -> str:
    """A new hash with a random salt: Argon2id, or scrypt where nothing here computes that. `memory` in bytes.

    The original reads both. HashUnsupported without either.
    """
    try:
        return argon2_make(password, passes, memory)
    except HashUnsupported:
        return scrypt_make(password, passes, memory)


def best_crypt(password: bytes, logins: int = AUTH_LOGINS, memory: int = AUTH_MEMORY) -> str:
    """A new hash, as expensive as `logins` at the same time can be borne: they share `memory` bytes and the processors.

    Checking it takes about AUTH_TIME seconds of this machine's time, less when more logins than processors are
    expected, but never less than AUTH_TIME_MIN. Compat: pure-pw's best_crypt() adds up its trials, so that a check
    takes one to two times as long as wanted; here the number of passes is calculated from one trial, in processor
    time, so that other work on the machine makes no weaker hashes.
    """
    share = max(memory // logins, AUTH_MEMORY_MIN)
    target = max(AUTH_TIME / max(logins // AUTH_CORES, 1), AUTH_TIME_MIN)
    passes = 1
    while True:
        start = time.process_time()
        password_hash(password, passes, share)
        spent = time.process_time() - start
        if spent * 8 >= target:
            return password_hash(password, max(1, round(passes * target / spent)), share)
        passes *= 2

# ==== PureDB ======================================================================================
# The file of virtual users (one line each, 18 fields between colons: pure-pw(8), README.Virtual-Users) and the
# database made from it, which is what a login reads: "PDB2"; 257 offsets, one per low byte of a key's hash and the
# end; for each of these buckets the sorted pairs (hash, offset of the record), or one word when it is empty; then the
# records (length, key, length, value). All numbers are 32 bits, big endian; offsets are absolute. The key is the
# login, the value the rest of its line.
#
# A lookup opens the file, so a new database counts at once, and reads with pread(2) only: a file that shrinks under
# an mmap(2) would kill the process. Nothing that the file says is believed before its size has been asked.

PUREDB_INDEX = 4 + 257 * 4          # where the buckets begin
PUREDB_NEIGHBOURS = 16              # records that puredb_sample looks at before it gives up
PASSWD_LINE_MAX = 2046              # bytes of a line that the original's tools read
PASSWD_FIELDS = ("login", "hash", "uid", "gid", "gecos", "home", "bandwidth_ul", "bandwidth_dl",
                 "ratio_ul", "ratio_dl", "max_sessions", "quota_files", "quota_size", "allow_local", "deny_local",
                 "allow_client", "deny_client", "time")


class PureDBError(Exception):
    """The database cannot be used: its path, and why."""


class PasswdEntry(NamedTuple):
    """One virtual user. None, or "" for text, where the line does not say."""
    login: bytes
    hash: str
    uid: int
    gid: int
    gecos: bytes
    home: bytes                             # absolute, may hold "/./"
    bandwidth_ul: "int | None" = None       # bytes/s; 0 is no limit
    bandwidth_dl: "int | None" = None
    ratio_ul: "int | None" = None           # at least 1
    ratio_dl: "int | None" = None
    max_sessions: "int | None" = None       # 0 is no limit, None the server's
    quota_files: "int | None" = None
    quota_size: "int | None" = None         # bytes
    allow_local: str = ""                   # lists of addresses, networks, host names, with commas
    deny_local: str = ""
    allow_client: str = ""
    deny_client: str = ""
    time: str = ""                          # "hhmm-hhmm", leading zeros may be missing

    @classmethod
    def from_fields(cls, fields: "list[bytes]") -> "PasswdEntry":
        """The user that the fields of a line describe; ValueError names the first one that cannot be understood.

        Compat: pw_puredb_parseline() of 1.0.54, which refuses what 1.0.50 guessed at; our other numbers are as strict.
        """
        if len(fields) < 6:
            raise ValueError("fields are missing: at least login:hash:uid:gid:gecos:home are needed")
        given = dict(zip(PASSWD_FIELDS, passwd_padded(fields)))
        for name in ("login", "hash", "home"):
            if not given[name]:
                raise ValueError(f"field {name} is empty")
        if not given["home"].startswith(b"/"):
            raise ValueError(f"field home should begin with a slash, not [{printable(given['home'])}]")
        begin, dash, end = given["time"].partition(b"-")
        if given["time"] and not (dash and begin.isdigit() and end.isdigit() and len(begin) < 5 and len(end) < 5):
            raise ValueError(f"field time should be like 900-1800, not [{printable(given['time'])}]")
        uid, gid = (passwd_number(name, given[name], 1, 0xFFFFFFFE) for name in ("uid", "gid"))
        numbers = [passwd_number(name, given[name]) if given[name] else None for name in PASSWD_FIELDS[6:13]]
        numbers[2:4] = [number or None for number in numbers[2:4]]      # Compat: a ratio of 0 is none
        texts = [given[name].decode("utf-8", "surrogateescape") for name in PASSWD_FIELDS[13:]]
        return cls(given["login"], given["hash"].decode("ascii", "replace"), uid, gid, given["gecos"], given["home"],
                   *numbers, *texts)            # type: ignore[arg-type]


def passwd_padded(fields: "list[bytes]") -> "list[bytes]":
    """All 18 fields: those that are missing are empty, those beyond are dropped."""
    return (fields + [b""] * len(PASSWD_FIELDS))[:len(PASSWD_FIELDS)]


def passwd_number(name: str, text: bytes, lowest: int = 0, highest: int = (1 << 64) - 1) -> int:
    """The number in field `name`; ValueError that names it when it is none, or beyond the limits."""
    if not text.isdigit() or len(text) > 20 or not lowest <= int(text) <= highest:
        raise ValueError(f"field {name} should be a number from {lowest} to {highest}, not [{printable(text)}]")
    return int(text)


def passwd_entry(line: bytes) -> PasswdEntry:
    """The user that `line` describes; ValueError as from_fields."""
    return PasswdEntry.from_fields(line.split(b":"))


def puredb_hash(key: bytes) -> int:
    """The 32 bits that sort and find `key`."""
    value = 5381
    for byte in reversed(key):
        value = value * 33 ^ byte           # what exceeds 32 bits never comes back down
    return value & 0xFFFFFFFF


def puredb_build(records: "list[tuple[bytes, bytes]]") -> bytes:
    """The database of (key, value) records, byte for byte what pure-pw mkdb makes. ValueError beyond 4 GiB."""
    number = struct.Struct(">I").pack
    buckets: list[list[tuple[int, int]]] = [[] for _ in range(256)]
    data: list[bytes] = []
    position = 0
    for key, value in records:
        hashed = puredb_hash(key)
        buckets[hashed & 0xFF].append((hashed, position))
        data += number(len(key)), key, number(len(value)), value
        position += 8 + len(key) + len(value)
    first = PUREDB_INDEX + sum(8 * len(bucket) or 4 for bucket in buckets)
    if first + position > 0xFFFFFFFF:
        raise ValueError("more than 4 GiB of users do not fit into a PureDB")
    starts, index, offset = [], [], PUREDB_INDEX
    for low_byte, bucket in enumerate(buckets):
        starts.append(number(offset))
        offset += 8 * len(bucket) or 4
        pairs = [number(hashed) + number(place + first) for hashed, place in sorted(bucket)]
        index += pairs or [number(low_byte + 1)]
    return b"".join([b"PDB2", *starts, number(offset), *index, *data])


class PureDB:
    """A database that is open for reading; use it in a `with` statement. Every method raises PureDBError."""

    def __init__(self, path: str) -> None:
        self.path = path
        try:
            self.fd = os.open(path, os.O_RDONLY | os.O_NONBLOCK)
        except OSError as error:
            raise PureDBError(f"{path}: {error.strerror}") from None
        self.size = 0

    def __enter__(self) -> "PureDB":
        status = os.fstat(self.fd)
        self.size = status.st_size if stat.S_ISREG(status.st_mode) else 0
        try:
            if self.read(0, 4) != b"PDB2":
                raise self.damaged("it does not begin with PDB2")
        except PureDBError:
            os.close(self.fd)
            raise
        return self

    def __exit__(self, *_: Any) -> None:
        os.close(self.fd)

    def damaged(self, reason: str) -> PureDBError:
        return PureDBError(f"{self.path}: this is no PureDB, or a damaged one: {reason}")

    def read(self, offset: int, length: int) -> bytes:
        """Exactly `length` bytes from `offset`."""
        if offset + length > self.size:
            raise self.damaged(f"{length} bytes at {offset} are beyond its end")
        try:
            data = os.pread(self.fd, length, offset)
        except OSError as error:
            raise PureDBError(f"{self.path}: {error.strerror}") from None
        if len(data) != length:
            raise self.damaged(f"{length} bytes at {offset} cannot be read")
        return data

    def words(self, offset: int, count: int) -> "tuple[int, ...]":
        """`count` numbers of 32 bits from `offset`."""
        return struct.unpack(f">{count}I", self.read(offset, 4 * count))

    def bucket(self, low_byte: int) -> "tuple[int, int]":
        """Where the pairs of this bucket begin, and how many they are."""
        start, end = self.words(4 + 4 * low_byte, 2)
        if not PUREDB_INDEX <= start < end <= self.size:
            raise self.damaged(f"bucket {low_byte} has impossible limits")
        return start, (end - start) // 8

    def record(self, offset: int) -> "tuple[bytes, bytes]":
        """(key, value) of the record at `offset`."""
        key = self.read(offset + 4, *self.words(offset, 1))
        offset += 4 + len(key)
        return key, self.read(offset + 4, *self.words(offset, 1))

    def find(self, key: bytes) -> "bytes | None":
        """The value of the first record of that key; None when there is none. No more than 30 small reads."""
        wanted = puredb_hash(key)
        start, count = self.bucket(wanted & 0xFF)
        low, high = 0, count
        while low < high:
            middle = (low + high) // 2
            if self.words(start + 8 * middle, 1)[0] < wanted:
                low = middle + 1
            else:
                high = middle
        for slot in range(low, count):
            hashed, offset = self.words(start + 8 * slot, 2)
            if hashed != wanted:
                break
            found, value = self.record(offset)
            if found == key:
                return value
        return None

    def sample(self, key: bytes) -> str:
        """See puredb_sample."""
        wanted, left = puredb_hash(key), PUREDB_NEIGHBOURS
        starts = self.words(4, 257)             # at once: a missing user may not cost more than one who is there
        if not PUREDB_INDEX <= starts[0] <= starts[-1] <= self.size or list(starts) != sorted(starts):
            raise self.damaged("its buckets have impossible limits")
        for step in range(256):
            bucket = (wanted + step) & 0xFF
            count = (starts[bucket + 1] - starts[bucket]) // 8
            for turn in range(min(count, left)):
                _, offset = self.words(starts[bucket] + 8 * (((wanted >> 8) + turn) % count), 2)
                hashed = self.record(offset)[1].partition(b":")[0].decode("ascii", "replace")
                if password_usable(hashed):
                    return hashed
                left -= 1
        return ""


def puredb_find(path: str, login: bytes) -> "bytes | None":
    """What the database knows of `login`: the rest of its line; None when there is no such user. PureDBError."""
    with PureDB(path) as database:
        return database.find(login)


def puredb_sample(path: str, login: bytes = b"") -> str:
    """The password hash of a neighbour of `login` in the database's order; "" when no neighbour has one. PureDBError.

    For password_waste: a name that does not exist costs what some user's wrong password costs, the same user's each
    time, so that it looks like just another user even where hashes are of several kinds.
    """
    with PureDB(path) as database:
        return database.sample(login)


class Replacement:
    """A new content for a file: `with Replacement(path) as new: new.write(...)`; an exception keeps the old one.

    The new file is `path`.tmp, locked until all is done: who finds it waits, then begins with what it became. Killed
    at any moment this leaves the old file or the new one, and perhaps a .tmp that nobody locks, which the next one
    removes. Its mode 0400 (0600 is the last step) tells it from the .tmp of the original's pure-pw, which takes no
    lock and is in the way (FileExistsError), as it is for the original itself. A symbolic link stays one.
    """

    def __init__(self, path: str) -> None:
        self.path = os.path.realpath(path)
        self.temporary = self.path + ".tmp"
        self.fd = -1

    def __enter__(self) -> "Replacement":
        from fcntl import LOCK_EX, flock
        while True:
            try:
                self.fd = os.open(self.temporary, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW, 0o400)
            except FileExistsError:
                self.wait_for_other()
                continue
            flock(self.fd, LOCK_EX)
            if self.is_temporary(self.fd):          # else somebody took it for abandoned before it was locked
                return self
            os.close(self.fd)

    def is_temporary(self, fd: int) -> bool:
        """Whether the temporary file's name still stands for the open file `fd`."""
        try:
            return os.path.samestat(os.fstat(fd), os.lstat(self.temporary))
        except FileNotFoundError:
            return False

    def wait_for_other(self) -> None:
        """Come back when nobody writes a new version any more; FileExistsError when something else has the name."""
        from fcntl import LOCK_EX, flock
        try:
            fd = os.open(self.temporary, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK)
        except FileNotFoundError:
            return
        try:
            flock(fd, LOCK_EX)
            if self.is_temporary(fd):
                if os.fstat(fd).st_mode != stat.S_IFREG | 0o400:
                    raise FileExistsError(errno.EEXIST, "in the way: another program writes it, or left it behind",
                                          self.temporary)
                os.unlink(self.temporary)
        finally:
            os.close(fd)

    def write(self, data: bytes) -> None:
        view = memoryview(data)
        while view:
            view = view[os.write(self.fd, view):]

    def __exit__(self, kind: Any, *_: Any) -> None:
        try:
            if kind is None:
                self.commit()
        finally:
            if self.is_temporary(self.fd):
                os.unlink(self.temporary)
            os.close(self.fd)

    def commit(self) -> None:
        """Put the new file in the old one's place, with its owner, and both on the disk."""
        try:
            old = os.stat(self.path)
            if (old.st_uid, old.st_gid) != (os.geteuid(), os.getegid()) and os.geteuid() == 0:
                os.fchown(self.fd, old.st_uid, old.st_gid)
        except FileNotFoundError:
            pass
        os.fsync(self.fd)
        os.rename(self.temporary, self.path)
        os.fchmod(self.fd, 0o600)
        directory = os.open(os.path.dirname(self.path), os.O_RDONLY)
        try:
            os.fsync(directory)
        finally:
            os.close(directory)


def puredb_write(path: str, records: "Callable[[], list[tuple[bytes, bytes]]]") -> None:
    """Replace the database by one of `records()`, called under the lock: who writes last has read last. OSError."""
    with Replacement(path) as new:
        new.write(puredb_build(records()))

# ==== Accounts and access rules ===================================================================
# What a back end answers (Account), from where somebody comes (Peer), and the rules of an account that say from where
# and when it may be used: pure-pw(8), -r -R -i -I -z. A rule that cannot be understood, or a host name in a deny list
# that cannot be resolved, refuses; the log tells which. All of it is judged after the password, so that nobody learns
# of a rule who does not know the password. Addresses are compared by `ipaddress`, IPv4-mapped ones as IPv4.


class Account(NamedTuple):
    """Who somebody is after the login, and what they may use. Limits: None = the account says nothing, -y -n decide."""
    name: bytes
    uid: int
    gid: int
    home: bytes                             # absolute; "A/./B": chroot to A, start in B
    groups: "tuple[int, ...] | None" = None  # supplementary groups, the primary one among them; None: not looked up
    gecos: bytes = b""
    bandwidth_ul: int = 0                   # bytes/s; 0: not given
    bandwidth_dl: int = 0
    ratio_ul: int = 0                       # 0: not given
    ratio_dl: int = 0
    quota_files: "int | None" = None
    quota_size: "int | None" = None         # bytes
    max_sessions: "int | None" = None       # 0: no limit
    anonymous: bool = False
    backend: str = ""                       # the row of AUTH_BACKENDS that found it
    tilde: bool = False                     # "CWD ~user" means system users
    vhost: str = ""                         # the server's address, when `home` is that virtual host's directory


class Peer(NamedTuple):
    """Both ends of a control connection."""
    address: str                            # the client's
    port: int
    local_address: str                      # the server's
    local_port: int
    encrypted: bool = False
    sni: str = ""                           # the server name that the client asked for in its TLS handshake


class Refused(Exception):
    """Refused(reason): no login. The reason is for the log; the client hears the same whatever it is."""


def address_text(text: str) -> str:
    """A socket's address without scope, an IPv4-mapped one as IPv4; what is no IP address as it is."""
    plain = text.partition("%")[0]
    return plain[7:] if plain.startswith("::ffff:") and "." in plain else plain


def address_scoped(name: "tuple[Any, ...]") -> str:
    """The address in what getsockname(2) returns, a link-local one with its interface: bind(2) wants to know that, too."""
    return "%s%%%d" % (name[0], name[3]) if len(name) == 4 and name[3] else str(name[0])


def address_to_bind(address: str, port: int) -> "tuple[Any, ...]":
    """What socket.bind() takes for what address_scoped() returned."""
    host, _, scope = address.partition("%")
    return (host, port, 0, int(scope)) if scope else (host, port)


def address_parse(text: str) -> Any:
    """The ipaddress object of a socket's address, as address_text shows it. Raises ValueError."""
    import ipaddress
    return ipaddress.ip_address(address_text(text))


def network_parse(text: str) -> Any:
    """The network "address" or "address/bits" (host bits may be set), None for a host name. Raises ValueError.

    Compat: octets may be padded with zeros, and a width of 0 is malformed (access_ip_match of 1.0.54).
    """
    import ipaddress
    host, slash, bits = text.partition("/")
    octets = host.split(".")
    if len(octets) == 4 and all(o.isdigit() and o.isascii() for o in octets):
        host = ".".join(str(int(o)) for o in octets)
    elif ":" not in host:
        letters = host.translate(dict.fromkeys(map(ord, ".-_")))
        if slash or not letters.isalnum() or not host.isascii() or (letters.isdigit() and "-" in host):
            raise ValueError("neither an address nor a host name")
        return None
    if slash and (not bits.isdigit() or not bits.isascii() or int(bits) == 0):
        raise ValueError("the width of the network is no number from 1 on")
    network = ipaddress.ip_network(host + slash + bits, strict=False)
    mapped = getattr(network.network_address, "ipv4_mapped", None)
    if mapped is None or network.prefixlen < 96:
        return network
    return ipaddress.ip_network((mapped, network.prefixlen - 96))


def host_addresses(name: str, version: int) -> "list[str]":
    """The addresses of `name` of that IP version, perhaps none. Raises OSError when it cannot be resolved."""
    family = socket.AF_INET if version == 4 else socket.AF_INET6
    # bytes, because a str goes through the idna codec, which imports half a megabyte of tables
    found = socket.getaddrinfo(name.encode(), None, type=socket.SOCK_STREAM)
    return [str(entry[4][0]) for entry in found if entry[0] == family]


def access_named(address: Any, name: str, unresolved: bool, log: Any) -> bool:
    """Whether a host's name is that of `address`; `unresolved` for a name without an answer.

    Compat: all its addresses count, where the original looks at the first one only.
    """
    try:
        return any(address_parse(a) == address for a in host_addresses(name, address.version))
    except OSError as error:
        log.warning(f"access rule: cannot resolve [{name}]: {error}")
        return unresolved


def access_listed(address: Any, rules: str, unresolved: bool, log: Any) -> bool:
    """Whether `address` is in the comma-separated list `rules`. Raises ValueError that names a malformed item.

    IPv4 items never match IPv6 addresses, nor the other way round. Names are asked for when nothing else has matched.
    """
    networks, names = [], []
    for rule in filter(None, (item.strip() for item in rules.split(","))):
        try:
            network = network_parse(rule)
        except ValueError as error:
            raise ValueError(f"malformed access rule [{rule}]: {error}") from None
        if network is not None:
            networks.append(network)
        else:
            names.append(rule)
    return any(address in network for network in networks) or any(access_named(address, n, unresolved, log) for n in names)


def access_allows(address: str, allow: str, deny: str, log: Any) -> bool:
    """Whether somebody at `address` passes the two lists: in `allow` unless that is empty, and not in `deny`.

    An item is an address, a network or a host name (access_ip_check). False, with a line in the log, when any item is
    malformed. Compat: the original stops reading a list at the first match, skips malformed items of the other
    family and lets in whom an unresolvable name in a deny list was meant for.
    """
    if not allow and not deny:
        return True
    try:
        where = address_parse(address)
        allowed = not allow or access_listed(where, allow, False, log)
        denied = bool(deny) and access_listed(where, deny, True, log)
    except ValueError as error:
        log.warning(str(error))
        return False
    return allowed and not denied


def access_now(restriction: str, now: float, log: Any) -> bool:
    """Whether local time `now` (time.time()) is within "HHMM-HHMM", both ends included; 2200-600 goes over midnight.

    False, with a line in the log, when the restriction cannot be understood (time_restrictions_check of 1.0.54).
    """
    if not restriction:
        return True
    first, _, last = (part.strip() for part in restriction.partition("-"))
    if not (first + last).isascii() or not first.isdigit() or not last.isdigit():
        log.warning(f"malformed time restriction [{restriction}]: it must look like 900-1800")
        return False
    local = time.localtime(now)
    begin, end, clock = int(first), int(last), local.tm_hour * 100 + local.tm_min
    if begin <= end:
        return begin <= clock <= end
    return clock >= begin or clock <= end


def access_is_trusted(trusted: "tuple[str, ...]", peer: Peer) -> bool:
    """Whether the server's address that the client came to may be used to log in (-V): elsewhere all are anonymous."""
    return not trusted or address_text(peer.local_address) in map(address_text, trusted)


def access_check(entry: Any, peer: Peer, now: float, log: Any) -> None:
    """Raise Refused unless the rules of a PasswdEntry allow this client, at this address of ours, at this time."""
    if not access_allows(peer.address, entry.allow_client, entry.deny_client, log):
        raise Refused(f"the account may not be used from {address_text(peer.address)}")
    if not access_allows(peer.local_address, entry.allow_local, entry.deny_local, log):
        raise Refused(f"the account may not be used at {address_text(peer.local_address)}")
    if not access_now(entry.time, now, log):
        raise Refused("the account may not be used at this time")

# ==== Authentication back ends ====================================================================
# Who knows users and passwords: one row of AUTH_BACKENDS each. A row's check answers None (no such user: the next back
# end of -l is asked), an Account, Refused (known, but not like this: nobody else is asked), or BackendBroken (nobody
# gets in). All of it runs in the login child, as root: nothing here reads from the client, and what it reads from
# elsewhere is bounded. Modules, libraries and the name service are loaded before the first fork.
# Wherever hashes are compared here, a user who does not exist costs what a wrong password costs.
#
#   puredb:FILE    pure-pw(8)'s database
#   sqlite:FILE    the same fields in a table, see SQLITE_SCHEMA
#   unix           passwd(5), shadow(5), shells(5)
#   pam            pam(3), service "pure-ftpd"
#   extauth:FILE   the socket of pure-authd(8)

EXTAUTH_TRIES, EXTAUTH_PAUSE = 6, 1.0       # connecting to pure-authd: how often, and seconds between
EXTAUTH_QUEUE_SECONDS = 5                   # for pure-authd to take the connection
EXTAUTH_SECONDS = 50.0                      # for all of it; a login child has a minute
EXTAUTH_ANSWER_MAX = 4095                   # bytes, as the original
SHADOW_LINE_MAX = 4096                      # bytes; a longer line of /etc/shadow is nobody's
PAM_SERVICE = b"pure-ftpd"
PAM_LIBRARIES = ("libpam.so.0", "libpam.so", "libpam.dylib", "libpam.so.6", "libpam.so.2")
VIRTUAL_HOSTS = ("/etc/pure-ftpd/pure-ftpd", "/etc/pure-ftpd")  # Debian's and the usual place of ADDRESS directories

SQLITE_SCHEMA = """
CREATE TABLE users (
    login         TEXT PRIMARY KEY,
    hash          TEXT NOT NULL,        -- as pure-pw writes it
    uid           INTEGER NOT NULL,     -- neither may be 0
    gid           INTEGER NOT NULL,
    gecos         TEXT,
    home          TEXT NOT NULL,        -- absolute; /home/joe/./ confines joe to it
    bandwidth_ul  INTEGER,              -- bytes per second
    bandwidth_dl  INTEGER,
    ratio_ul      INTEGER,
    ratio_dl      INTEGER,
    max_sessions  INTEGER,
    quota_files   INTEGER,
    quota_size    INTEGER,              -- bytes
    allow_local   TEXT,                 -- 192.168.1.1,10.0.0.0/8,2001:db8::/32,host.example
    deny_local    TEXT,
    allow_client  TEXT,
    deny_client   TEXT,
    time          TEXT                  -- 900-1800
);
"""


class BackendBroken(Exception):
    """BackendBroken(reason): a back end cannot tell. Nobody gets in by it, nor by those after it."""


class Backend(NamedTuple):
    """One row of AUTH_BACKENDS."""
    check: Callable             # (argument, user, password, peer, log) -> Account or None; Refused, BackendBroken
    sample: Callable            # (argument, user) -> some other user's hash, "" for none; BackendBroken
    preload: "Callable | None" = None           # (argument) -> None; ConfigError


def password_right(user: bytes, password: bytes, hashed: str, sample: "Callable[[], str]", log: Any) -> bool:
    """Whether `password` fits `hashed`. Where that is no hash, or none we can check, the answer takes as long."""
    if password_usable(hashed):
        try:
            return password_verify(password, hashed)
        except HashUnsupported as error:
            log.error(f"the password of {printable(user)} cannot be checked: {error}")
    password_waste(password, sample())
    return False


def groups_of(name: "str | None", uid: int, gid: int) -> "tuple[int, ...]":
    """Every group of the system user `name`, or else of the one with `uid`; only `gid` when there is none."""
    import pwd
    try:
        return tuple(os.getgrouplist(name or pwd.getpwuid(uid).pw_name, gid))
    except KeyError:
        return (gid,)


# ---- puredb and sqlite: records as pure-pw writes them -------------------------------------------


def puredb_check(path: str, user: bytes, password: bytes, peer: Peer, log: Any) -> "Account | None":
    """The account of a PureDB. Compat: each puredb: has its own file; in the original the last one serves for all."""
    try:
        value = puredb_find(path, user)
    except PureDBError as error:
        raise BackendBroken(f"puredb: {error}") from None
    if value is None:
        return None
    line, sample = user + b":" + value, lambda: puredb_hash_sample(path, user)
    return record_account("puredb", line, {}, password, sample, peer, log)


def puredb_hash_sample(path: str, user: bytes) -> str:
    try:
        return puredb_sample(path, user)
    except PureDBError as error:
        raise BackendBroken(f"puredb: {error}") from None


def record_account(backend: str, line: bytes, rules: "dict[str, Any]", password: bytes,
                   sample: "Callable[[], str]", peer: Peer, log: Any) -> Account:
    """The account of a line as in pureftpd.passwd when password and rules permit. Raises Refused (pw_puredb_parseline).

    `rules` take the place of those of the line, which cannot hold IPv6 addresses.
    """
    user, hashed, *_ = line.split(b":")
    if not password_right(user, password, hashed.decode("latin-1"), sample, log):
        raise Refused("wrong password")
    try:
        entry = passwd_entry(line)._replace(**rules)
    except ValueError as error:
        raise Refused(f"its record in {backend} is malformed: {error}") from None
    access_check(entry, peer, time.time(), log)
    return Account(user, entry.uid, entry.gid, entry.home, groups_of(None, entry.uid, entry.gid), entry.gecos,
                   entry.bandwidth_ul or 0, entry.bandwidth_dl or 0, entry.ratio_ul or 0, entry.ratio_dl or 0,
                   entry.quota_files, entry.quota_size, entry.max_sessions, backend=backend)


def sqlite_query(path: str, query: str, parameters: "tuple[str, ...]") -> "list[tuple]":
    """The rows that `query` finds, texts as bytes. The file is only read, and SQL in it (views, say) not trusted."""
    import sqlite3
    name = path.replace("%", "%25").replace("?", "%3f").replace("#", "%23")
    try:
        connection = sqlite3.connect(f"file:{name}?mode=ro", uri=True, timeout=5.0)
        try:
            connection.text_factory = bytes
            connection.execute("PRAGMA trusted_schema = OFF")
            return connection.execute(query, parameters).fetchall()
        finally:
            connection.close()
    except sqlite3.Error as error:
        raise BackendBroken(f"sqlite: {path}: {error}") from None


def sqlite_check(path: str, user: bytes, password: bytes, peer: Peer, log: Any) -> "Account | None":
    """The account of a row of the table `users`, see SQLITE_SCHEMA."""
    try:
        login = user.decode()
    except UnicodeDecodeError:
        return None
    rows = sqlite_query(path, f"SELECT {', '.join(PASSWD_FIELDS)} FROM users WHERE login = ? LIMIT 1", (login,))
    if not rows:
        return None
    fields = [b"" if field is None else field if isinstance(field, bytes) else str(field).encode() for field in rows[0]]
    if any(b":" in field for field in fields[:13]):
        raise BackendBroken(f"sqlite: {path}: a field of {printable(user)} holds a colon")
    rules = dict(zip(PASSWD_FIELDS[13:], [field.decode("utf-8", "replace") for field in fields[13:]]))
    line, sample = b":".join(fields[:13]), lambda: sqlite_sample(path, user)
    return record_account("sqlite", line, rules, password, sample, peer, log)


def sqlite_sample(path: str, user: bytes) -> str:
    """A hash from the rows that follow `user`'s name, or else from the first ones."""
    after = user.decode("utf-8", "ignore")
    for least in (after, ""):
        rows = sqlite_query(path, "SELECT hash FROM users WHERE login > ? ORDER BY login LIMIT 16", (least,))
        for hashed in (row[0].decode("latin-1") for row in rows if isinstance(row[0], bytes)):
            if password_usable(hashed):
                return hashed
    return ""


def sqlite_preload(path: str) -> None:
    try:
        import sqlite3
    except ImportError:
        raise ConfigError(f"-l sqlite:{path}: this Python has no sqlite3 module: install it, or use puredb") from None
    assert sqlite3


# ---- unix: passwd, shadow, shells ----------------------------------------------------------------


class ShadowEntry(NamedTuple):
    """What shadow(5) says of a password. Days are counted from 1970; -1: not given."""
    hash: str
    changed: int                            # day of the last change
    maximum: int                            # days that a password lives
    expire: int                             # day on which the account ends


def shadow_find(user: bytes, path: str = "/etc/shadow") -> "ShadowEntry | None":
    """The entry of `user`. Raises OSError, and ValueError when the entry is malformed."""
    start = user + b":"
    with open(path, "rb") as file:
        for line in iter(lambda: file.readline(SHADOW_LINE_MAX), b""):
            if line.startswith(start):
                fields = line.rstrip(b"\n").split(b":")
                days = [int(f) if f else -1 for f in (fields[2], fields[4], fields[7])]
                return ShadowEntry(fields[1].decode("latin-1"), *days)
    return None


def shadow_sample(argument: "str | None", user: bytes, path: str = "/etc/shadow") -> str:
    """The first hash of /etc/shadow: what passwd(1) makes there is of one kind."""
    try:
        with open(path, "rb") as file:
            for line in iter(lambda: file.readline(SHADOW_LINE_MAX), b""):
                hashed = line.split(b":")[1:2]
                if hashed and password_usable(hashed[0].decode("latin-1")):
                    return hashed[0].decode("latin-1")
    except FileNotFoundError:
        pass
    except OSError as error:
        raise BackendBroken(f"unix: {path}: {error.strerror}") from None
    return ""


def shells_read(path: str = "/etc/shells") -> "set[str]":
    """The shells whose users may log in; the two of getusershell(3) when there is no list."""
    try:
        with open(path, encoding="utf-8", errors="surrogateescape") as file:
            return {line.strip() for line in file if line.startswith("/")}
    except FileNotFoundError:
        return {"/bin/sh", "/bin/csh"}


def unix_objection(shell: str, shadow: "ShadowEntry | None", shells: "set[str]", today: int) -> str:
    """Why a system user may not come in even with the right password; "" when they may (pw_unix_check)."""
    if shell.lower() != "ftp" and shell not in shells:
        return f"the shell [{shell}] is not in /etc/shells"
    if shadow and 0 < shadow.expire < today:
        return "the account has expired"
    if shadow and shadow.maximum > 0 and shadow.changed > 0 and shadow.changed + shadow.maximum < today:
        return "the password has expired"
    return ""


def unix_check(argument: "str | None", user: bytes, password: bytes, peer: Peer, log: Any) -> "Account | None":
    """The account of a system user.

    Compat: shells and expiry are judged after the password (the original does so before, which can be timed), and
    /etc/shadow is read itself: whoever keeps passwords elsewhere in the name service needs pam.
    """
    import pwd
    try:
        entry = pwd.getpwnam(os.fsdecode(user))
    except (KeyError, ValueError):
        return None
    shadow, hashed = None, entry.pw_passwd
    if hashed in ("x", "##" + entry.pw_name):
        try:
            shadow = shadow_find(os.fsencode(entry.pw_name))
        except (OSError, ValueError, IndexError) as error:
            raise BackendBroken(f"unix: /etc/shadow: {getattr(error, 'strerror', 0) or error}") from None
        if shadow is None:
            log.warning(f"unix: {printable(user)} is not in /etc/shadow: if the password is kept elsewhere, use -l pam")
        hashed = shadow.hash if shadow else ""
    if not password_right(user, password, hashed, lambda: shadow_sample(None, user), log):
        raise Refused("wrong password")
    objection = unix_objection(entry.pw_shell, shadow, shells_read(), int(time.time() // 86400))
    if objection:
        raise Refused(objection)
    return system_account("unix", user, entry)


def system_account(backend: str, user: bytes, entry: Any) -> Account:
    """The account of an entry of passwd(5)."""
    return Account(user, entry.pw_uid, entry.pw_gid, os.fsencode(entry.pw_dir),
                   groups_of(entry.pw_name, entry.pw_uid, entry.pw_gid), os.fsencode(entry.pw_gecos),
                   backend=backend, tilde=True)


# ---- pam -----------------------------------------------------------------------------------------

PAM_TTY, PAM_RHOST, PAM_RUSER, PAM_FAIL_DELAY = 3, 4, 8, 10
PAM_PROMPT_ECHO_OFF, PAM_PROMPT_ECHO_ON, PAM_ERROR_MSG, PAM_TEXT_INFO = 1, 2, 3, 4
PAM_SILENT, PAM_DISALLOW_NULL_AUTHTOK, PAM_ESTABLISH_CRED = 0x8000, 1, 2
PAM_BUF_ERR, PAM_CONV_ERR = 5, 19
PAM_USER_UNKNOWN = 10 if sys.platform.startswith("linux") else 13
PAM_MESSAGES_MAX = 32


def pam_library() -> Any:
    """libpam with the prototypes of the functions used here, loaded once by the system. Raises OSError, ImportError."""
    import ctypes
    for name in PAM_LIBRARIES:
        try:
            library = ctypes.CDLL(name)
            break
        except OSError:
            continue
    else:
        raise OSError(errno.ENOENT, "libpam is not installed")
    handle, number, text = ctypes.c_void_p, ctypes.c_int, ctypes.c_char_p
    library.pam_start.argtypes = [text, text, ctypes.c_void_p, ctypes.POINTER(handle)]
    library.pam_set_item.argtypes = [handle, number, ctypes.c_void_p]
    for name in ("authenticate", "acct_mgmt", "setcred", "open_session", "close_session", "end"):
        getattr(library, "pam_" + name).argtypes = [handle, number]
    library.pam_strerror.argtypes = [handle, number]
    library.pam_strerror.restype = text
    return library


def pam_conversation(user: bytes, password: bytes) -> Any:
    """A struct pam_conv whose function answers what modules ask with `user` (echoed) and `password` (not echoed).

    The caller keeps it as long as it may be called. Messages need no answer; none is shown to the client.
    """
    import ctypes

    class Message(ctypes.Structure):
        _fields_ = (("style", ctypes.c_int), ("text", ctypes.c_char_p))

    class Response(ctypes.Structure):
        _fields_ = (("text", ctypes.c_void_p), ("code", ctypes.c_int))

    converse_type = ctypes.CFUNCTYPE(ctypes.c_int, ctypes.c_int, ctypes.POINTER(ctypes.POINTER(Message)),
                                     ctypes.POINTER(ctypes.c_void_p), ctypes.c_void_p)

    class PamConversation(ctypes.Structure):
        _fields_ = (("converse", converse_type), ("data", ctypes.c_void_p))

    library = ctypes.CDLL(None)
    library.calloc.restype = library.strdup.restype = ctypes.c_void_p           # PAM frees what these return
    library.calloc.argtypes = [ctypes.c_size_t, ctypes.c_size_t]
    library.strdup.argtypes = [ctypes.c_char_p]
    answers = {PAM_PROMPT_ECHO_ON: user, PAM_PROMPT_ECHO_OFF: password, PAM_TEXT_INFO: None, PAM_ERROR_MSG: None}

    def converse(count: int, messages: Any, responses: Any, data: Any) -> int:
        if not 0 < count <= PAM_MESSAGES_MAX or any(messages[i].contents.style not in answers for i in range(count)):
            return PAM_CONV_ERR
        memory = library.calloc(count, ctypes.sizeof(Response))
        if not memory:
            return PAM_BUF_ERR
        replies = ctypes.cast(memory, ctypes.POINTER(Response))
        for i in range(count):
            answer = answers[messages[i].contents.style]
            replies[i].text = library.strdup(answer) if answer is not None else None
        responses[0] = memory
        return 0

    return PamConversation(converse_type(converse), None)


def pam_check(argument: "str | None", user: bytes, password: bytes, peer: Peer, log: Any,
              directory: "bytes | None" = None) -> "Account | None":
    """The account of a system user whom PAM lets in. `directory`: for tests, where the service is described.

    Compat: whoever is in passwd(5) and does not pass is refused for good, where the original asks the next back end;
    and PAM_RHOST is the client, not this host.
    """
    import ctypes
    import pwd
    try:
        entry: Any = pwd.getpwnam(os.fsdecode(user))
    except (KeyError, ValueError):
        entry = None
    library = pam_library()
    conversation = pam_conversation(user, password)
    handle = ctypes.c_void_p()
    start = [PAM_SERVICE, user, ctypes.byref(conversation)]
    if directory is None:
        code = library.pam_start(*start, ctypes.byref(handle))
    else:
        code = library.pam_start_confdir(*start, directory, ctypes.byref(handle))
    if code:
        raise BackendBroken(f"pam: cannot be started (error {code})")
    try:
        code = pam_authenticate(library, handle, user, peer)
        if entry is None or code == PAM_USER_UNKNOWN:
            return None
        pam_demand(library, handle, "authentication", code)
        pam_demand(library, handle, "account", library.pam_acct_mgmt(handle, PAM_DISALLOW_NULL_AUTHTOK))
        pam_demand(library, handle, "credentials", library.pam_setcred(handle, PAM_ESTABLISH_CRED))
        code = library.pam_open_session(handle, PAM_SILENT)
        if code:
            log.warning(f"pam: session of {printable(user)}: {pam_error(library, handle, code)}")
        library.pam_close_session(handle, PAM_SILENT)       # Compat: at once; later this process is the user
    finally:
        library.pam_end(handle, code)
    return system_account("pam", user, entry)


def pam_authenticate(library: Any, handle: Any, user: bytes, peer: Peer) -> int:
    """The answer of the authentication phase. Modules learn who asks, and do not sleep after a failure: SERVER does."""
    import ctypes
    delay_type = ctypes.CFUNCTYPE(None, ctypes.c_int, ctypes.c_uint, ctypes.c_void_p)
    no_delay = delay_type(lambda code, microseconds, data: None)
    for item, value in ((PAM_TTY, PAM_SERVICE), (PAM_RUSER, user), (PAM_RHOST, address_text(peer.address).encode())):
        library.pam_set_item(handle, item, value)
    if sys.platform.startswith("linux"):
        library.pam_set_item(handle, PAM_FAIL_DELAY, ctypes.cast(no_delay, ctypes.c_void_p))
    code = library.pam_authenticate(handle, PAM_DISALLOW_NULL_AUTHTOK)
    if sys.platform.startswith("linux"):
        library.pam_set_item(handle, PAM_FAIL_DELAY, None)
    return code


def pam_error(library: Any, handle: Any, code: int) -> str:
    return (library.pam_strerror(handle, code) or b"").decode("utf-8", "replace") or f"error {code}"


def pam_demand(library: Any, handle: Any, phase: str, code: int) -> None:
    """Raise Refused unless `code` is PAM_SUCCESS. What is broken cannot be told apart: pam_exec says "system error"."""
    if code:
        raise Refused(f"pam: {phase}: {pam_error(library, handle, code)}")


def pam_sample(argument: "str | None", user: bytes) -> str:
    """A hash of /etc/shadow, which most services compare with."""
    try:
        return shadow_sample(argument, user)
    except BackendBroken:
        return ""


def pam_preload(argument: "str | None") -> None:
    try:
        pam_library()
    except (OSError, ImportError) as error:
        raise ConfigError(f"-l pam: {error}: install libpam, or use unix or puredb") from None


# ---- extauth: ask pure-authd ---------------------------------------------------------------------

# fmt: off
EXTAUTH_FIELDS = {                  # key of an answer: field of the Account
    b"uid":                     "uid",
    b"gid":                     "gid",
    b"throttling_bandwidth_ul": "bandwidth_ul",
    b"throttling_bandwidth_dl": "bandwidth_dl",
    b"user_quota_size":         "quota_size",
    b"user_quota_files":        "quota_files",
    b"ratio_upload":            "ratio_ul",
    b"ratio_download":          "ratio_dl",
    b"per_user_max":            "max_sessions",
}
# fmt: on


def extauth_question(user: bytes, password: bytes, peer: Peer) -> bytes:
    """What pure-authd is asked. Raises Refused when a value would break a line."""
    values = (user, password, address_text(peer.local_address).encode(), b"%d" % peer.local_port,
              address_text(peer.address).encode(), peer.sni.encode("ascii", "replace"), b"%d" % peer.encrypted)
    if any(byte in value for value in values for byte in b"\n\r\0"):
        raise Refused("a line break in what the client sent")
    return b"account:%b\npassword:%b\nlocalhost:%b\nlocalport:%b\npeer:%b\nsni_name:%b\nencrypted:%b\nend\n" % values


def extauth_connect(path: str, log: Any, pause: float, deadline: float) -> socket.socket:
    """A connection to pure-authd, which may be just starting. Raises OSError after the last try, or the deadline."""
    for left in reversed(range(EXTAUTH_TRIES)):
        connection = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        try:            # SO_SNDTIMEO: a connect() that does not block fails at once when many are waiting
            connection.setsockopt(socket.SOL_SOCKET, socket.SO_SNDTIMEO, struct.pack("ll", EXTAUTH_QUEUE_SECONDS, 0))
            connection.connect(path)
            return connection
        except OSError as error:
            connection.close()
            if not left or time.monotonic() > deadline:
                raise
            log.warning(f"extauth: {path}: {error.strerror or error}; {left} more tries")
            time.sleep(pause)
    raise OSError(errno.ECONNREFUSED, "no try left")


def extauth_ask(path: str, question: bytes, log: Any, pause: float = EXTAUTH_PAUSE,
                seconds: float = EXTAUTH_SECONDS) -> bytes:
    """The whole answer to `question`. Raises BackendBroken when there is none within `seconds`."""
    deadline = time.monotonic() + seconds
    try:
        with extauth_connect(path, log, pause, deadline) as connection:
            connection.settimeout(seconds)
            connection.sendall(question)
            answer = b""
            while len(answer) < EXTAUTH_ANSWER_MAX:
                connection.settimeout(max(0.001, deadline - time.monotonic()))
                block = connection.recv(EXTAUTH_ANSWER_MAX - len(answer))
                if not block:
                    break
                answer += block
            return answer
    except OSError as error:
        raise BackendBroken(f"extauth: {path}: {error.strerror or error}") from None


def extauth_number(line: bytes, value: bytes) -> int:
    """Raises Refused unless `value` is a number of at most 20 digits, blanks around it ignored."""
    digits = value.strip()
    if not digits.isdigit() or len(digits) > 20:
        raise Refused(f"extauth: malformed answer [{printable(line)}]")
    return int(digits)


def extauth_account(user: bytes, answer: bytes) -> "Account | None":
    """The account in an answer of pure-authd; None for "no such user". Raises Refused (pw_extauth_check).

    Compat: a number that is none refuses, where the original reads its first digits or 0.
    """
    fields: "dict[str, Any]" = {}
    verdict, home, ended, tilde = 0, b"", False, False
    for line in answer.split(b"\n")[:-1]:
        key, _, value = line.partition(b":")
        if key == b"auth_ok":
            verdict = 1 if value.strip() == b"1" else 0 if value.strip() == b"0" else -1
        elif key == b"dir" and value.startswith(b"/"):
            home = value
        elif key == b"slow_tilde_expansion":
            tilde = extauth_number(line, value) == 0
        elif key in EXTAUTH_FIELDS:
            fields[EXTAUTH_FIELDS[key]] = extauth_number(line, value)
        ended = ended or line.startswith(b"end")
    if answer and not ended:
        raise Refused("extauth: the answer has no end")
    if verdict == 0:
        return None
    if verdict < 0:
        raise Refused("refused by extauth")
    if not 0 < fields.get("uid", 0) < 2 ** 32 - 1 or not 0 < fields.get("gid", 0) < 2 ** 32 - 1 or not home:
        raise Refused("extauth: an answer without uid, gid (neither may be 0) and absolute dir")
    groups = groups_of(None, fields["uid"], fields["gid"])
    return Account(name=user, home=home, groups=groups, backend="extauth", tilde=tilde, **fields)


def extauth_check(path: str, user: bytes, password: bytes, peer: Peer, log: Any) -> "Account | None":
    """The account that pure-authd answers. Compat: without it nobody gets in; the original asks the next back end."""
    question = extauth_question(user, password, peer)
    answer = extauth_ask(path, question, log)
    wipe(question)
    if not answer:
        log.warning(f"extauth: {path}: an empty answer about {printable(user)}, taken for: no such user")
    return extauth_account(user, answer)


def extauth_preload(path: str) -> None:
    if len(os.fsencode(path)) > 107:
        raise ConfigError(f"-l extauth:{path}: the path of a socket has at most 107 bytes")


# ---- the table, and how it is asked --------------------------------------------------------------

# fmt: off
AUTH_BACKENDS = {               # argument: LOGIN_METHODS
    "puredb":  Backend(puredb_check,  puredb_hash_sample),
    "sqlite":  Backend(sqlite_check,  sqlite_sample, sqlite_preload),
    "unix":    Backend(unix_check,    shadow_sample),
    "pam":     Backend(pam_check,     pam_sample,    pam_preload),
    "extauth": Backend(extauth_check, lambda *_: "", extauth_preload),
}
# fmt: on


def authentication_chain(options: Any) -> "tuple[tuple[str, str | None], ...]":
    """What -l says; the system's users when it says nothing."""
    return tuple(options.login) or (("unix", None),)


def authentication_preload(options: Any, log: Any = None) -> None:
    """Load what login children need, before the first fork. Raises ConfigError for what is missing.

    A database that is missing or broken is no reason not to start: each login looks at it again. `log` hears of it.
    """
    import ipaddress    # noqa: F401
    samples = []
    for name, argument in authentication_chain(options):
        backend = AUTH_BACKENDS[name]
        if backend.preload:
            backend.preload(argument)
        try:
            samples.append(backend.sample(argument, b""))
        except BackendBroken as error:
            if log is not None:
                log.warning(f"nobody can log in by {name} until this is repaired: {error}")
    passwords_preload(tuple(samples))
    groups_of(None, 0, 0)                       # loads the modules of the name service


def authenticate(options: Any, user: bytes, password: bytes, peer: Peer, log: Any) -> Account:
    """The account of `user`, by the first back end that knows them. Raises Refused, BackendBroken.

    Compat: uid 0 is always refused (the original lets root in unless -u): no process of ours is root for a client.
    """
    if not access_is_trusted(options.trustedip, peer):
        raise Refused(f"{peer.local_address} is for anonymous users only (-V)")
    if not user or any(byte in text for text in (user, password) for byte in b"\n\r\0"):
        raise Refused("a name or password that cannot be")
    chain = authentication_chain(options)
    for name, argument in chain:
        account = AUTH_BACKENDS[name].check(argument, user, password, peer, log)
        if account is not None:
            if account.uid == 0 or account.uid < options.minuid:
                raise Refused(f"uid {account.uid} is below the minimum ({max(1, options.minuid)}, -u)")
            return account
    samples = [sample for name, argument in chain for sample in (AUTH_BACKENDS[name].sample(argument, user),) if sample]
    password_waste(password, samples[sum(user) % len(samples)] if samples else "")  # always the same one for a name
    raise Refused("no such user")


def anonymous_account(options: Any, peer: Peer, root: bytes = b"",
                      vhosts: "tuple[str, ...]" = VIRTUAL_HOSTS) -> Account:
    """The account of whoever logs in as ftp or anonymous. Raises Refused when there is no system user for that.

    As root: the user ftp, or _ftp, and its home. As an ordinary user: ourselves, in FTP_ANON_DIR, else in `root`, else
    where we were started. In both cases the server's address is looked for in the directories `vhosts`: a directory, or
    a link to one, takes the home's place there.
    """
    uid, gid, groups = os.geteuid(), os.getegid(), None
    if uid:
        home = os.environb.get(b"FTP_ANON_DIR") or root or os.getcwdb()
    else:
        entry = anonymous_user()
        uid, gid, home = entry.pw_uid, entry.pw_gid, os.fsencode(entry.pw_dir)
        groups = groups_of(entry.pw_name, uid, gid)
    address = address_text(peer.local_address)
    found = [path for path in (os.path.join(place, address) for place in vhosts) if address and os.path.isdir(path)]
    home = os.fsencode(found[0]) if found else home
    if not home.startswith(b"/"):
        raise Refused("the directory for anonymous users is no absolute path")
    return Account(b"ftp", uid, gid, home, groups, anonymous=True, backend="anonymous",
                   vhost=address if found else "")


def anonymous_user() -> Any:
    """The entry of passwd(5) for anonymous users. Raises Refused (douser)."""
    import pwd
    for name in ("ftp", "_ftp"):
        try:
            entry = pwd.getpwnam(name)
        except KeyError:
            continue
        if not entry.pw_uid or not entry.pw_gid:
            raise Refused(f"the system user {name} has uid or gid 0")
        return entry
    raise Refused("anonymous users need a system user called ftp (or _ftp), and there is none")

# ==== Messages between the processes ==============================================================
# The processes speak over SOCK_SEQPACKET pairs: one message is one send and one recv, descriptors travel beside it. A
# message is a fixed struct, for LOGIN followed by fields whose lengths the struct gives. Whoever receives one checks
# that it is consumed to the last byte; anything else is a MessageError, and ends that channel (never the process that
# reads it).
#
#   LOGIN              SERVER, TLS -> PRIV   who wants in, with what, and what was negotiated; + the client's socket or relay
#   STARTTLS           SERVER -> PRIV        a client that said AUTH TLS; + its socket
#   VERDICT            login child -> asker  the login's id, and how it ended
#   ADMITTED           session -> PRIV       the credentials are checked, the user is in (another check may start)
#   BINDRESPORT        session -> PRIV       a socket bound to port 20 is wanted, for active mode
#   REMOVEFTPWHOENTRY  session -> PRIV       the scoreboard entry of the session that asks may go
#   REOPENLOG          session -> PRIV       the transfer log of that index, opened anew: it may have been moved away
#   ENDED              PRIV -> SERVER        the session of that login id is gone
#   DRAIN, STOP        PRIV -> SERVER, ...   accept nobody any more; say goodbye now
#   CONSULT            PRIV -> SERVER        may a TLS client of that address try a password now?
#   GRANTED            SERVER -> PRIV        it may, or it may not; later, when it has to wait
#   OUTCOME            PRIV -> SERVER        how that try ended: a VERDICT_*
#   JOINED             PRIV -> SERVER        a client that came in through the SERVER before, which drains; its address
#   NEWLOG             PRIV -> SERVER        + a socket to the syslogd that was started again
#   (on the relay)     TLS -> session        a length and the TLS session of that many bytes, before what the client says

(LOGIN, STARTTLS, VERDICT, ADMITTED, BINDRESPORT, REMOVEFTPWHOENTRY, ENDED, DRAIN, STOP, CONSULT, GRANTED, OUTCOME, REOPENLOG,
 JOINED, NEWLOG) = range(1, 16)
ANSWER_FD, ANSWER_ERROR, ANSWER_REMOVEFTPWHOENTRY = range(32, 35)
MESSAGE_MAX = 16384                 # bytes; a LOGIN with everything at its limit is less than half of it
USER_MAX, PASSWORD_MAX, CLIENT_MAX, SNI_MAX, PENDING_MAX = 127, 511, 255, 253, 8192       # bytes
MSG_TRUNC, MSG_CTRUNC = int(socket.MSG_TRUNC), int(socket.MSG_CTRUNC)       # numbers: & makes enums each time

VERDICT_IN, VERDICT_WRONG, VERDICT_BROKEN, VERDICT_LIMIT = range(4)

# kind, id, flags, facts, then the lengths of user, password, client, sni, pending
LOGIN_HEAD = struct.Struct("!BIBHBHBBH")
STARTTLS_HEAD = struct.Struct("!BIBHBB")    # kind, id, flags, facts, lengths of client, sni
NUMBERED = struct.Struct("!BIB")            # kind, id, detail: VERDICT, ENDED
PLAIN = struct.Struct("!BB")                # kind, detail: all the others
LOGIN_LIMITS = (USER_MAX, PASSWORD_MAX, CLIENT_MAX, SNI_MAX, PENDING_MAX)


class MessageError(Exception):
    """What came over a channel is no message that may come there."""


class Negotiated:
    """What a client has agreed with the server, before its login and after."""

    __slots__ = ("binary", "facts", "sized_buffer", "private", "client", "implicit", "sni")

    def __init__(self, binary: bool = False, facts: int = 0xFFFF, sized_buffer: bool = False, private: bool = False,
                 client: bytes = b"", implicit: bool = False, sni: bytes = b"") -> None:
        self.binary = binary                # TYPE I or L 8; the original starts with A
        self.facts = facts                  # bit n: fact n of MLST_FACTS is wanted (OPTS MLST)
        self.sized_buffer = sized_buffer    # PBSZ has been said
        self.private = private              # PROT P
        self.client = client                # what CLNT told
        self.implicit = implicit            # TLS without AUTH TLS, on a port of its own
        self.sni = sni                      # the host name that the client asked for in its TLS handshake

    def flags(self) -> int:
        return self.binary | self.sized_buffer << 1 | self.private << 2 | self.implicit << 3

    @classmethod
    def from_message(cls, flags: int, facts: int, client: bytes, sni: bytes) -> "Negotiated":
        return cls(bool(flags & 1), facts, bool(flags & 2), bool(flags & 4), client, bool(flags & 8), sni)


class LoginRequest(NamedTuple):
    """A LOGIN, taken apart."""
    id: int                     # the asker's number for this login
    user: bytes
    password: bytes
    negotiated: Negotiated
    pending: bytes              # what the client has sent after its PASS


def login_message(request: LoginRequest) -> bytes:
    """The bytes of a LOGIN. Raises ValueError when a field is longer than its limit."""
    fields = request.user, request.password, request.negotiated.client, request.negotiated.sni, request.pending
    if any(len(field) > most for field, most in zip(fields, LOGIN_LIMITS)):
        raise ValueError("a field of LOGIN is too long")
    head = LOGIN_HEAD.pack(LOGIN, request.id, request.negotiated.flags(), request.negotiated.facts, *map(len, fields))
    return b"".join((head, *fields))                       # one object: whoever sends it wipes the password from memory


def login_parse(message: bytes) -> LoginRequest:
    """The LOGIN in `message`. Raises MessageError unless every length is within its limit and they add up."""
    if len(message) < LOGIN_HEAD.size:
        raise MessageError("short LOGIN")
    kind, number, flags, facts, *lengths = LOGIN_HEAD.unpack_from(message)
    if kind != LOGIN or LOGIN_HEAD.size + sum(lengths) != len(message) or any(n > m for n, m in zip(lengths, LOGIN_LIMITS)):
        raise MessageError("LOGIN whose lengths do not add up")
    fields, start = [], LOGIN_HEAD.size
    for length in lengths:
        fields.append(message[start:start + length])
        start += length
    return LoginRequest(number, fields[0], fields[1], Negotiated.from_message(flags, facts, fields[2], fields[3]), fields[4])


def login_id(message: bytes) -> int:
    """The id of a LOGIN, read without looking at anything a client sent."""
    if len(message) < LOGIN_HEAD.size:
        raise MessageError("short LOGIN")
    return LOGIN_HEAD.unpack_from(message)[1]


def starttls_message(number: int, negotiated: Negotiated) -> bytes:
    return STARTTLS_HEAD.pack(STARTTLS, number, negotiated.flags(), negotiated.facts,
                              len(negotiated.client), len(negotiated.sni)) + negotiated.client + negotiated.sni


def starttls_parse(message: bytes) -> "tuple[int, Negotiated]":
    """The id and the state in a STARTTLS. Raises MessageError."""
    if len(message) < STARTTLS_HEAD.size:
        raise MessageError("short STARTTLS")
    kind, number, flags, facts, length, named = STARTTLS_HEAD.unpack_from(message)
    middle = STARTTLS_HEAD.size + length
    if kind != STARTTLS or middle + named != len(message):
        raise MessageError("STARTTLS whose lengths do not add up")
    return number, Negotiated.from_message(flags, facts, message[STARTTLS_HEAD.size:middle], message[middle:])


def numbered_parse(message: bytes) -> "tuple[int, int, int]":
    """(kind, id, detail) of a VERDICT or ENDED. Raises MessageError."""
    if len(message) != NUMBERED.size:
        raise MessageError("message of %d bytes" % len(message))
    return NUMBERED.unpack(message)


def addressed_message(kind: int, number: int, address: str) -> bytes:
    """A CONSULT or JOINED."""
    return NUMBERED.pack(kind, number, 0) + address.encode()


def addressed_parse(message: bytes) -> "tuple[int, str]":
    """(number, address) of a CONSULT or JOINED. Raises MessageError."""
    if not NUMBERED.size < len(message) <= NUMBERED.size + 64:
        raise MessageError("message of %d bytes" % len(message))
    return NUMBERED.unpack_from(message)[1], message[NUMBERED.size:].decode("ascii", "replace")


def plain_parse(message: bytes) -> "tuple[int, int]":
    """(kind, detail) of a message that carries nothing else. Raises MessageError."""
    if len(message) != PLAIN.size:
        raise MessageError("message of %d bytes" % len(message))
    return PLAIN.unpack(message)


def channel_pair() -> "tuple[socket.socket, socket.socket]":
    """Two ends of a channel.

    SOCK_SEQPACKET, where the system has it for Unix sockets (not on macOS), else SOCK_DGRAM.
    """
    try:
        return socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    except OSError:
        return socket.socketpair(socket.AF_UNIX, socket.SOCK_DGRAM)


def message_receive(channel: socket.socket, most_fds: int = 0) -> "tuple[bytes, list[int]]":
    """One message and its descriptors; b"" at the end of the channel. Raises MessageError when it was cut off.

    A process that is out of descriptors gets a message without them, as if none had been sent.
    """
    if not most_fds:
        return channel.recv(MESSAGE_MAX), []
    message, fds, flags, _ = socket.recv_fds(channel, MESSAGE_MAX, most_fds)
    if flags & MSG_TRUNC or flags & MSG_CTRUNC and fds:
        for fd in fds:
            os.close(fd)
        raise MessageError("message with too much in it")
    return message, fds

# ==== Control connection: lines in, replies out ===================================================
# Both sides of the login read commands the same way (RFC 959 section 5.3, RFC 1123 section 4.1.2.12): bytes are
# collected, cut at LF, freed from telnet's signals, and every control byte becomes `_`, so no CR, LF or NUL reaches a
# file name. Names stay bytes. Nothing here touches a socket: values go in and come out.

LINE_MAX = 4112                                         # bytes of a line, as the original's buffer
TELNET_SIGNALS = bytes(range(240, 256))                 # SE ... IAC: what RFC 854 puts before an urgent ABOR
CONTROL_TO_UNDERSCORE = bytes(95 if b < 32 or b == 127 else b for b in range(256))
VERB_BYTES = frozenset(b"@abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ0123456789")


def command_line(raw: bytes) -> bytes:
    """The command in `raw` (a line without its LF): no CR at its end, no telnet signals before it, no control byte in
    it.
    """
    if raw[-1:] == b"\r":
        raw = raw[:-1]
    if raw[:1] >= b"\xf0":
        raw = raw.lstrip(TELNET_SIGNALS)
    if b"\xff\xff" in raw:
        raw = raw.replace(b"\xff\xff", b"\xff")         # RFC 854: IAC IAC is one byte of data
    return raw.translate(CONTROL_TO_UNDERSCORE)


class ControlInput:
    """The bytes that came over a control connection, as lines."""

    __slots__ = ("buffer", "start")

    def __init__(self, pending: bytes = b"") -> None:
        self.buffer, self.start = pending, 0            # what is before `start` has been handed out

    def feed(self, data: bytes) -> None:
        self.buffer = self.buffer[self.start:] + data
        self.start = 0

    def wipe(self) -> None:
        """Leave nothing of what has been handed out in memory."""
        past, self.buffer, self.start = self.buffer, self.buffer[self.start:], 0
        if self.buffer is not past:
            wipe(past)

    def pending(self) -> bytes:
        """What has come and was not handed out."""
        return self.buffer[self.start:]

    def line(self) -> "bytes | None":
        """The next command, None when none is complete. Raises Hangup when it is longer than LINE_MAX."""
        end = self.buffer.find(b"\n", self.start)
        if (end if end >= 0 else len(self.buffer)) - self.start > LINE_MAX:
            raise Hangup(421, "That line is too long, goodbye")
        if end < 0:
            return None
        raw = self.buffer[self.start:end - self.buffer.endswith(b"\r", self.start, end)]
        self.start = end + 1
        line = command_line(raw)
        if line is not raw and raw[:4].upper() == b"PASS":
            wipe(raw)
        return line

    def holds(self, verb: bytes) -> bool:
        """Whether a complete line that waits is this command (ABOR, above all)."""
        lines = self.buffer[self.start:].split(b"\n")[:-1]
        return any(command_line(raw).upper().rstrip() == verb for raw in lines)

    def next_is(self, verb: bytes) -> bool:
        """Whether the next complete line is this command, without an argument."""
        end = self.buffer.find(b"\n", self.start)
        return end >= 0 and command_line(self.buffer[self.start:end]).upper() == verb

    def full(self) -> bool:
        """Whether so much waits that nothing more should be read before some is run."""
        return len(self.buffer) - self.start > PENDING_MAX // 2


def command_split(line: bytes) -> "tuple[bytes, bytes]":
    """(VERB, argument) of a command line: one space goes, any other belongs to the argument."""
    verb, _, argument = line.partition(b" ")
    return verb.upper(), argument


def reply_bytes(code: int, text: "str | bytes") -> bytes:
    """A reply as it is sent (RFC 959 section 4.2).

    Lines of a longer text that begin with a space go out bare (RFC 2389).
    """
    if isinstance(text, str):
        text = text.encode("utf-8", "surrogateescape")
    if b"\n" not in text:
        return b"%d %s\r\n" % (code, text)
    *lines, last = text.split(b"\n")
    return b"".join([b"%s\r\n" % line if line[:1] == b" " else b"%d-%s\r\n" % (code, line) for line in lines]
                    + [b"%d %s\r\n" % (code, last)])


def quoted(path: bytes) -> bytes:
    """`path` between quotes, those in it doubled (RFC 959 appendix II), control bytes replaced."""
    return b'"%s"' % path.translate(CONTROL_TO_UNDERSCORE).replace(b'"', b'""')


def whole_number(text: bytes, most: int = 2 ** 63 - 1) -> "int | None":
    """The number that `text` is when it is nothing but ASCII digits and not above `most`; else None."""
    if not text.isdigit() or len(text) > 20:
        return None
    value = int(text)
    return value if value <= most else None


def stamp_parse(text: bytes) -> float:
    """Seconds since 1970 of YYYYMMDDhhmmss[.fraction] in UTC (RFC 3659 section 2.3).

    Raises ValueError when there is no such time.
    """
    digits, _, fraction = text.partition(b".")
    if len(digits) != 14 or not digits.isdigit() or fraction and not fraction.isdigit():
        raise ValueError("not YYYYMMDDhhmmss")
    year, month, day = int(digits[:4]), int(digits[4:6]), int(digits[6:8])
    shifted = year - (month <= 2)                       # years from March on: the leap day is the last
    days = (shifted * 365 + shifted // 4 - shifted // 100 + shifted // 400
            + (153 * (month + (-3 if month > 2 else 9)) + 2) // 5 + day - 719469)
    seconds = days * 86400 + int(digits[8:10]) * 3600 + int(digits[10:12]) * 60 + int(digits[12:14])
    if stamp_text(seconds).encode() != digits:          # month 13, 30 February, 25 o'clock: another time comes back
        raise ValueError("no such time")
    return seconds + (float(b"0." + fraction) if fraction else 0)


def stamp_text(seconds: float) -> str:
    return time.strftime("%Y%m%d%H%M%S", time.gmtime(seconds))

# ==== Tree: the files of a session ================================================================
# A path is what the client means: absolute in the session's root or relative to its working directory, in bytes. Who
# confines:
#
#   KernelTree   chroot(2), or nobody for accounts that are trusted with the whole machine: the kernel walks the path.
#   WalkedTree   nobody but us, without root: every path is walked from the root's descriptor, one component at a time,
#                each opened with O_NOFOLLOW relative to the one before; links are read and walked the same way, `..` pops.
#                What is swapped between two steps is either opened as what it is now or refused: no name is ever
#                trusted, no string compared.
#
# Both offer the same operations, because each is written once in terms of place(path): the directory to start from
# and the name to give to the kernel. A WalkedTree also keeps the server's own files out of reach: by their place and
# by their inode.

LINKS_MAX = 40                      # symbolic links met in one walk, as the kernel's limit (path_resolution(7))
DIRECTORY_ONLY = os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC | getattr(os, "O_PATH", 0)
FILE_ALWAYS = os.O_CLOEXEC | os.O_NONBLOCK | os.O_NOCTTY        # so that a FIFO or a terminal never holds a session up


def permission_denied(path: bytes) -> OSError:
    return PermissionError(errno.EACCES, os.strerror(errno.EACCES), path)


class Place:
    """Where a name is: `with place as (at, name)`, `at` being a dir_fd (or None) that is closed in the end."""

    __slots__ = ("at", "name")

    def __init__(self, at: "int | None", name: bytes) -> None:
        self.at, self.name = at, name

    def __enter__(self) -> "tuple[int | None, bytes]":
        return self.at, self.name

    def __exit__(self, *_: object) -> None:
        if self.at is not None:
            os.close(self.at)


class Tree:
    """The operations of both kinds. All raise OSError, and take paths as the client means them."""

    kernel_follows = True           # whether a final link is the kernel's to follow

    def place(self, path: bytes, follow: bool = True) -> Place:
        """Where `path` is; with `follow`, where it leads when it is a link."""
        raise NotImplementedError

    def guard(self, st: os.stat_result, path: bytes) -> None:
        """Raise PermissionError when this is one of the server's own files."""

    def working_directory(self) -> bytes:
        raise NotImplementedError

    def change_directory(self, path: bytes) -> None:
        raise NotImplementedError

    def absolute(self, path: bytes) -> bytes:
        """`path` from the root, simplified as text: for replies and logs, never for opening."""
        parts: "list[bytes]" = []
        for part in (path if path[:1] == b"/" else self.working_directory() + b"/" + path).split(b"/"):
            if part == b"..":
                del parts[-1:]
            elif part not in (b"", b"."):
                parts.append(part)
        return b"/" + b"/".join(parts)

    def real(self, path: bytes) -> bytes:
        """Where `path` leads, without links, from the root; for logs, never for opening.

        What is not there stays as it is.
        """
        raise NotImplementedError

    def stat(self, path: bytes) -> os.stat_result:
        with self.place(path) as (at, name):
            return os.stat(name, dir_fd=at, follow_symlinks=self.kernel_follows)

    def lstat(self, path: bytes) -> os.stat_result:
        with self.place(path, follow=path[-1:] == b"/") as (at, name):
            return os.stat(name, dir_fd=at, follow_symlinks=False)

    def readlink(self, path: bytes) -> bytes:
        with self.place(path, follow=False) as (at, name):
            return os.readlink(name, dir_fd=at)

    def open(self, path: bytes, flags: int, mode: int = 0o666) -> int:
        """A descriptor; never waits (FIFO). With O_NOFOLLOW in `flags` a final link raises ELOOP."""
        if flags & os.O_CREAT and path[-1:] == b"/":
            raise IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR), path)
        follow = not flags & (os.O_NOFOLLOW | os.O_EXCL)
        with self.place(path, follow) as (at, name):
            if not self.kernel_follows:
                flags |= os.O_NOFOLLOW
            fd = os.open(name, flags | FILE_ALWAYS, mode, dir_fd=at)
        try:
            self.guard(os.fstat(fd), path)
        except OSError:
            os.close(fd)
            raise
        return fd

    def mkdir(self, path: bytes, mode: int) -> None:
        with self.place(path.rstrip(b"/") or path, follow=False) as (at, name):
            os.mkdir(name, mode, dir_fd=at)

    def rmdir(self, path: bytes) -> None:
        with self.place(path, follow=False) as (at, name):
            os.rmdir(name, dir_fd=at)

    def unlink(self, path: bytes) -> None:
        with self.place(path, follow=False) as (at, name):
            os.unlink(name, dir_fd=at)

    def rename(self, source: bytes, target: bytes) -> None:
        with self.place(source, follow=False) as (at, name):
            self.guard(os.stat(name, dir_fd=at, follow_symlinks=False), source)
            with self.place(target, follow=False) as (to, new):
                os.rename(name, new, src_dir_fd=at, dst_dir_fd=to)

    def chmod(self, path: bytes, mode: int) -> None:
        """chmod(2) of what `path` leads to, by descriptor: nothing can be put in its place between the walk and the
        call.
        """
        if self.kernel_follows:
            os.chmod(path, mode)
            return
        fd = self.descriptor(path)
        try:
            os.chmod("/proc/self/fd/%d" % fd if os.path.exists("/proc/self/fd") else fd, mode)
        finally:
            os.close(fd)

    def utime(self, path: bytes, stamp: float) -> None:
        with self.place(path) as (at, name):
            os.utime(name, (stamp, stamp), dir_fd=at, follow_symlinks=self.kernel_follows)

    def descriptor(self, path: bytes) -> int:
        """An O_PATH descriptor (where that exists) of what `path` leads to, guarded."""
        with self.place(path) as (at, name):
            fd = os.open(name, os.O_NOFOLLOW | os.O_CLOEXEC | os.O_NONBLOCK | getattr(os, "O_PATH", os.O_RDONLY), dir_fd=at)
        try:
            st = os.fstat(fd)
            if stat.S_ISLNK(st.st_mode):
                raise OSError(errno.ELOOP, os.strerror(errno.ELOOP), path)
            self.guard(st, path)
        except OSError:
            os.close(fd)
            raise
        return fd

    def disk(self) -> "os.statvfs_result":
        """statvfs(3) of the working directory."""
        with self.place(b".") as (at, name):
            return os.statvfs(at if at is not None else name)


class KernelTree(Tree):
    """The tree of a process that the kernel confines, or that nobody has to."""

    def __init__(self) -> None:
        self.last_known = os.getcwdb()

    def place(self, path: bytes, follow: bool = True) -> Place:
        return Place(None, path)

    def working_directory(self) -> bytes:
        try:
            self.last_known = os.getcwdb()
        except OSError:
            pass                    # removed under our feet: its last name is the best answer
        return self.last_known

    def change_directory(self, path: bytes) -> None:
        os.chdir(path)

    def real(self, path: bytes) -> bytes:
        try:
            if b"/" not in path and not stat.S_ISLNK(os.lstat(path).st_mode):      # mostly; os.path.realpath() is slow
                return self.absolute(path)
            return os.path.realpath(path)
        except OSError:
            return self.absolute(path)          # the working directory is gone

    def stat(self, path: bytes) -> os.stat_result:
        return os.stat(path)

    def open(self, path: bytes, flags: int, mode: int = 0o666) -> int:
        return os.open(path, flags | FILE_ALWAYS, mode)


class OwnFiles:
    """The server's own files, which a session without chroot must not reach: user database, keys, logs, its program
    ...
    """

    def __init__(self, files: "list[bytes]", directories: "list[bytes]") -> None:
        # What each inode is, so that it is known by other names, too, and its path: see still().
        self.files: "dict[tuple[int, int], bytes]" = {}
        self.closed: "dict[tuple[int, int], bytes]" = {}        # directories that nobody enters
        self.ancestors: "dict[tuple[int, int], bytes]" = {}     # directories whose renaming would move an own file away
        self.places: "dict[bytes, set[bytes]]" = {}             # name: directories where it is ours, there already or not
        for path in directories:
            self.closed.update(self.add(path))
        for path in files:
            self.files.update(self.add(path))

    def add(self, path: bytes) -> "dict[tuple[int, int], bytes]":
        """Protect the place of `path`; what is there, and its name."""
        found: "dict[tuple[int, int], bytes]" = {}
        for name in (os.path.realpath(path), os.path.abspath(path)):
            above = name
            while above != os.path.dirname(above):
                above = os.path.dirname(above)
                inode = self.inode(above)
                if inode is not None:
                    self.ancestors.setdefault(inode, above)
            self.places.setdefault(os.path.basename(name), set()).add(os.path.dirname(name))
            inode = self.inode(name)
            if inode is not None:
                found.setdefault(inode, name)
        return found

    @staticmethod
    def inode(path: bytes) -> "tuple[int, int] | None":
        """(device, inode); None for what is not there (yet)."""
        try:
            st = os.stat(path)
        except OSError:
            return None
        return st.st_dev, st.st_ino

    @staticmethod
    def is_at(st: os.stat_result, path: bytes) -> bool:
        try:
            return os.path.samestat(st, os.stat(path))
        except OSError as error:
            return error.errno != errno.ENOENT

    def still(self, st: os.stat_result, known: "dict[tuple[int, int], bytes]") -> bool:
        """Whether that is one of `known`, still: the inode of what was removed, or replaced, is soon another file's."""
        path = known.get((st.st_dev, st.st_ino))
        return path is not None and self.is_at(st, path)


class WalkedTree(Tree):
    """A tree confined by walking. `root` is a descriptor of its top, which belongs to the tree from now on."""

    kernel_follows = False

    def __init__(self, root: int, own: "OwnFiles | None" = None, host_path: bytes = b"") -> None:
        self.root, self.own = root, own
        # where the root is outside: an absolute link into it stays meaningful
        self.host_path = host_path.rstrip(b"/")
        self.cwd: "list[bytes]" = []

    def working_directory(self) -> bytes:
        return b"/" + b"/".join(self.cwd)

    def change_directory(self, path: bytes) -> None:
        fds, names, _ = self.walk(path, follow=True, whole=True)
        try:
            os.close(os.open(b".", os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC, dir_fd=fds[-1]))
            self.cwd = names
        finally:
            for fd in fds:
                os.close(fd)

    def real(self, path: bytes) -> bytes:
        try:
            fds, names, last = self.walk(path, follow=True)
        except OSError:
            return self.absolute(path)
        for fd in fds:
            os.close(fd)
        return b"/" + b"/".join(names if last == b"." else [*names, last])

    def place(self, path: bytes, follow: bool = True) -> Place:
        fds, _, last = self.walk(path, follow, path.endswith(b"/."))
        for fd in fds[:-1]:
            os.close(fd)
        place = Place(fds[-1], last)
        if path[-1:] == b"/":
            self.check_directory(place, path)
        return place

    @staticmethod
    def check_directory(place: Place, path: bytes) -> None:
        """Close `place` and raise NotADirectoryError when there is something else: a slash follows its name."""
        try:
            if stat.S_ISDIR(os.stat(place.name, dir_fd=place.at, follow_symlinks=False).st_mode):
                return
        except OSError:
            return                              # nothing is there, which the caller's system call will tell
        with place:
            raise NotADirectoryError(errno.ENOTDIR, os.strerror(errno.ENOTDIR), path)

    def walk(self, path: bytes, follow: bool, whole: bool = False) -> "tuple[list[int], list[bytes], bytes]":
        """Open every directory on the way: (their descriptors from the root on, their names, the last name).

        The last name is what is left to look up in the last directory: b"." for the directory itself. With `whole` the
        last component is opened as a directory too. The caller closes the descriptors; on OSError there are none.
        """
        if not path:
            raise FileNotFoundError(errno.ENOENT, os.strerror(errno.ENOENT), path)
        rest = [part for part in path.split(b"/") if part not in (b"", b".")][::-1]
        if path[:1] != b"/":
            rest += self.cwd[::-1]
        names: "list[bytes]" = []
        fds, links = [os.dup(self.root)], 0
        try:
            while rest:
                part = rest.pop()
                if part == b"..":
                    if names:
                        os.close(fds.pop())
                        names.pop()
                    continue
                last = not rest and not whole
                target = self.link_target(fds[-1], part, path) if (not last or follow) else None
                if target is not None:
                    links += 1
                    if links > LINKS_MAX:
                        raise OSError(errno.ELOOP, os.strerror(errno.ELOOP), path)
                    if target[:1] == b"/":
                        target = self.inside(target)
                        while names:
                            os.close(fds.pop())
                            names.pop()
                    rest += [p for p in target.split(b"/") if p not in (b"", b".")][::-1]
                    continue
                if last:
                    self.guard_place(fds[-1], part, path)
                    return fds, names, part
                fds.append(os.open(part, DIRECTORY_ONLY, dir_fd=fds[-1]))
                names.append(part)
                self.guard_directory(fds[-1], path)
        except BaseException:
            for fd in fds:
                os.close(fd)
            raise
        return fds, names, b"."

    @staticmethod
    def link_target(at: int, name: bytes, path: bytes) -> "bytes | None":
        """What the link `name` says; None when it is no link (or is not there: the caller's system call will tell)."""
        try:
            return os.readlink(name, dir_fd=at)
        except OSError as error:
            if error.errno in (errno.EINVAL, errno.ENOENT):
                return None
            raise

    def inside(self, target: bytes) -> bytes:
        """An absolute link's target as seen from the root: as under chroot, or where it names the root's own place."""
        if self.host_path and (target + b"/").startswith(self.host_path + b"/"):
            return target[len(self.host_path):]
        return target

    def guard(self, st: os.stat_result, path: bytes) -> None:
        if self.own is not None and (self.own.still(st, self.own.files) or self.own.still(st, self.own.closed)):
            raise permission_denied(path)

    def guard_place(self, at: int, name: bytes, path: bytes) -> None:
        if self.own is not None and name in self.own.places:
            st = os.fstat(at)
            if any(self.own.is_at(st, directory) for directory in self.own.places[name]):
                raise permission_denied(path)

    def guard_directory(self, fd: int, path: bytes) -> None:
        if self.own is not None and self.own.closed and self.own.still(os.fstat(fd), self.own.closed):
            raise permission_denied(path)

    def rename(self, source: bytes, target: bytes) -> None:
        if self.own is not None and self.own.still(self.lstat(source), self.own.ancestors):
            raise permission_denied(source)
        super().rename(source, target)

# ==== Listings ====================================================================================
#
# What the directory commands send: here NLST, and MLSD and MLST (RFC 3659, section 7); LIST has a section of its own.
#
# nlst_blocks, mlsd_blocks and list_blocks return a Listing: iterate over it once for the bytes of the data connection,
# in blocks of some 64 KiB; then it knows what the final reply says. NLST and MLSD go through a directory in its own
# order, a thousand names at a time, and never hold it. What vanishes between scandir and stat is left out.
#
# What costs is one stat per entry; all else is arranged so as not to be seen beside it (measured, us per entry: scandir
# 0.4, stat 1.8, line 0.9). A line is one bytes % of four values; whatever many entries share (mode, owners, dates) is
# formatted once and kept in a Cache. scandir on a descriptor decodes names; a thousand at a time they go back to bytes.
#
# A directory is opened once, by tree.open, and its entries are looked up relative to that descriptor: that is fastest,
# and nobody can exchange the directory for a link to elsewhere in between. Only `..` and the targets of links go
# through the tree again, because these may lead out of it.

BATCH = 1000  # names looked at together: some 64 KiB of listing
NOTES = 10  # lines about what could not be listed; of one command there may be a thousand
BLOCK = 65536  # bytes; smaller pieces of a LIST are collected up to here
CONTROLS = bytes(range(1, 32)) + b"\x7f"  # a name with one of these would break the line it stands in: hidden
HALF_YEAR = 180 * 86400  # seconds; dates further away show the year instead of the time
DOTS = (b".", b"..")
MONTHS = b"??? Jan Feb Mar Apr May Jun Jul Aug Sep Oct Nov Dec".split()
FACTS = (b"type", b"size", b"sizd", b"modify", b"UNIX.mode", b"UNIX.uid", b"UNIX.gid", b"unique")


class Cache(dict):
    """What `compute(key)` returned for each key; starts anew at 4096 keys, so that huge directories cost no memory."""

    def __init__(self, compute):
        super().__init__()
        self.compute = compute

    def __missing__(self, key):
        if len(self) >= 4096:
            self.clear()
        value = self[key] = self.compute(key)
        return value


class IdNames(dict):
    """uid or gid -> its ten columns of a LIST line: a `known` name, what `lookup(id)` finds, or the number."""

    def __init__(self, known=(), lookup=None):
        super().__init__((number, self.column(name)) for number, name in dict(known).items())
        self.lookup = lookup

    @staticmethod
    def column(name):
        return b"%-10.10b" % os.fsencode(name)

    def __missing__(self, number):
        try:
            name = self.lookup(number) if self.lookup else str(number)
        except (KeyError, OSError):
            name = str(number)
        self[number] = self.column(name)
        return self[number]


class ListView(NamedTuple):
    """What a listing shows in this session. Everything that must be found out before chroot lies here."""

    users: IdNames  # from listing_names()
    groups: IdNames
    anonymous: bool = False  # MLSD: targets of links, but no uid and gid
    broken_clients: bool = False  # -b: a link is shown as what it leads to
    show_dot_files: bool = False  # -D: LIST -a always
    max_files: int = 10000  # -L: entries in one listing
    max_depth: int = 5  # -L: levels of LIST -R
    utc_offset: int = 0  # seconds that local time is ahead of UTC. Compat: fixed when the server starts (init_tz)
    facts: tuple = FACTS  # of MLSD and MLST, from facts_select()


def listing_names(uid, gids, chrooted, system_users):
    """(users, groups) for ListView; called before chroot. KeyErrors and a failing name service only mean numbers.

    Compat: a chrooted session knows but its own names, others ask the system for each id they meet; user names appear
    only for accounts of the system, not for virtual ones (getname, getgroup).
    """
    import grp
    import pwd

    users = IdNames(lookup=(lambda number: pwd.getpwuid(number).pw_name) if system_users else None)
    groups = IdNames(lookup=lambda number: grp.getgrgid(number).gr_name)
    if chrooted:
        for names, numbers in ((users, [uid]), (groups, gids)):
            for number in numbers:
                names[number]
            names.lookup = None
    return users, groups


class Listing:
    """A listing on its way: iterate over it for the bytes, then read the rest; close it if it may not be exhausted."""

    def __init__(self, limit, options=""):
        self.limit = limit
        self.options = options  # of LIST, as the final reply shows them: "-a -l"; "" for none
        self.count = 0  # entries listed
        self.notes = []  # lines (bytes) for the final reply: what could not be listed; at most NOTES
        self.blocks = iter(())

    def start(self, blocks):
        """This listing, its first and empty block taken: what refuses does so before there is a data connection."""
        next(blocks)
        self.blocks = blocks
        return self

    def __iter__(self):
        return self.blocks

    @property
    def truncated(self):
        """True when -L cut it off. Compat: or when it was just as long as -L allows."""
        return self.count >= self.limit

    def note(self, text, path):
        """Remember that `path` could not be listed, for the final reply."""
        if len(self.notes) < NOTES:
            self.notes.append(text % path[:100])

    def close(self):
        """Give back the open directory of a listing that nobody wants any more."""
        if hasattr(self.blocks, "close"):
            self.blocks.close()


# -- directories


def path_join(directory, name):
    """`name` in `directory` as bytes; an empty directory is the current one."""
    return directory + name if not directory or directory.endswith(b"/") else directory + b"/" + name


def name_hidden(name):
    """True if there is a control byte in `name` (or in many names joined). Compat: checkprintable."""
    return len(name.translate(None, CONTROLS)) != len(name)


def directory_open(tree, path):
    """A descriptor of the directory; OSError if it is none or cannot be read."""
    return tree.open(path or b".", os.O_RDONLY | os.O_DIRECTORY)


def directory_names(fd, dots=False):
    """The names in an open directory as lists of up to BATCH, in its own order, without hidden ones.

    With `dots`, `.` and `..` come first. Compat: not where they lie, scandir does not tell.
    """
    if dots:
        yield [*DOTS]
    with os.scandir(fd) as entries:
        while True:
            batch = [entry.name for entry in islice(entries, BATCH)]
            if not batch:
                return
            joined = os.fsencode("\0".join(batch))  # a call for each name would take longer than scandir itself
            names = joined.split(b"\0")
            yield [name for name in names if not name_hidden(name)] if name_hidden(joined) else names


def directory_argument(tree, argument):
    """(path, descriptor) of the directory that NLST and MLSD are asked for; b"" is the current one.

    Options are skipped, as clients send `NLST -a`; a directory of that very name comes first.
    Compat: `NLST -a dir` lists dir, donlst forgets its first letter.
    """
    if argument.startswith(b"-"):
        try:
            return argument, directory_open(tree, argument)
        except OSError:
            argument = argument.partition(b" ")[2].lstrip(b" ")
    return argument, directory_open(tree, argument)


# -- NLST


def nlst_blocks(tree, argument: bytes, view: ListView) -> Listing:
    """The Listing of NLST: every name, as RFC 959 wants it usable in RETR: with the argument before it.

    OSError when the argument is no readable directory (550). Compat: neither options nor globs (donlst).
    """
    listing = Listing(view.max_files)
    return listing.start(nlst_produce(listing, *directory_argument(tree, argument)))


def nlst_produce(listing, path, fd):
    """The blocks of nlst_blocks, an empty one first; closes `fd`."""
    try:
        yield b""
        prefix = path_join(path, b"")
        for names in directory_names(fd, dots=True):
            del names[listing.limit - listing.count:]
            if names:
                listing.count += len(names)
                yield prefix + (b"\r\n" + prefix).join(names) + b"\r\n"
            if listing.truncated:
                return
    finally:
        os.close(fd)


# -- MLSD and MLST


def facts_select(argument: bytes) -> tuple:
    """The facts that `OPTS MLST argument` asks for, in our order; unknown ones are ignored (RFC 3659, 7.9)."""
    wanted = argument.lower().split(b";")
    return tuple(fact for fact in FACTS if fact.lower() in wanted)


def facts_feature(selected=FACTS) -> str:
    """What follows MLST in FEAT: all facts, a star behind each that is selected (RFC 3659, 7.8)."""
    return "".join(fact.decode() + ("*;" if fact in selected else ";") for fact in FACTS)


def facts_template(view, kind, mode, device, uid, gid):
    """A format that makes a line of MLSD from (size, modify date, inode, name), for all entries that share the rest.

    A fact that is not selected swallows its value with %.0a. Compat: order and spelling of modernformat.
    """
    size = b"sizd" if stat.S_ISDIR(mode) else b"size"
    facts = [
        (b"type", b"type=%b;" % kind.replace(b"%", b"%%"), b""),
        (size, size + b"=%d;", b"%.0a"),
        (b"modify", b"modify=%b;", b"%.0a"),
        (b"UNIX.mode", b"UNIX.mode=0%o;" % stat.S_IMODE(mode), b""),
        (b"UNIX.uid", b"" if view.anonymous else b"UNIX.uid=%d;" % uid, b""),
        (b"UNIX.gid", b"" if view.anonymous else b"UNIX.gid=%d;" % gid, b""),
        (b"unique", b"unique=%xg%%x;" % (device & 0xFFFFFFFF), b"%.0a"),
    ]
    return b"".join(shown if fact in view.facts else hidden for fact, shown, hidden in facts) + b" %b"


def fact_kind(tree, path, mode, view):
    """The type fact of what is at `path`. Compat: only anonymous visitors see where links lead (modernformat)."""
    if stat.S_ISREG(mode):
        return b"file"
    if stat.S_ISDIR(mode):
        return {b".": b"cdir", b"..": b"pdir", b"/": b"pdir"}.get(path, b"dir")
    if not stat.S_ISLNK(mode):
        return b"unknown"
    target = link_target(tree, path)
    if not target or b";" in target or name_hidden(target):
        return b"OS.unix=symlink"
    return b"OS.unix=slink:" + (target if view.anonymous else b"")


def link_target(tree, path):
    """What the link says, b"" when it vanished."""
    try:
        return tree.readlink(path)
    except OSError:
        return b""


def link_resolved(tree, path, st):
    """What `path`, a link with the lstat `st`, leads to; `st` when it dangles."""
    try:
        return tree.stat(path)
    except OSError:
        return st


def civil_time(seconds):
    """time.gmtime, or 1970 for what no calendar holds: a bad time stamp must not hide a file."""
    try:
        return time.gmtime(seconds)
    except (OverflowError, ValueError, OSError):
        return time.gmtime(0)


class Stamps(dict):
    """Seconds since 1970 -> b"20231114221320" (RFC 3659, 2.3). A Cache that does without calling `compute`."""

    def __init__(self):
        super().__init__()
        self.days = Cache(lambda day: b"%04d%02d%02d" % civil_time(day * 86400)[:3])

    def __missing__(self, seconds):
        if len(self) >= 4096:
            self.clear()
        second = seconds % 86400  # of the day; written as hhmmss, an hour counts 10000 and a minute 100
        value = self[seconds] = b"%b%06d" % (
            self.days[seconds // 86400], second + second // 60 * 40 + second // 3600 * 4000)
        return value


def mlst_line(tree, name: bytes, view: ListView) -> bytes:
    """The facts, a space and `name` as it was given (b"" is the current directory); OSError when it does not exist.

    The caller puts a space before it (RFC 3659, 7.2).
    """
    name = name or b"."
    return mlst_format(tree, name, name, tree.lstat(name), view, Stamps())


def mlst_format(tree, path, name, st, view, stamps):
    """One line for the entry `name` at `path`: the slow way, which can do links and `..`.

    Compat: with -b all facts are the target's; modernformat keeps the link's own date.
    """
    if view.broken_clients and stat.S_ISLNK(st.st_mode):
        st = link_resolved(tree, path, st)
    kind = fact_kind(tree, name if name in DOTS else path, st.st_mode, view)
    template = facts_template(view, kind, st.st_mode, st.st_dev, st.st_uid, st.st_gid)
    return template % (st.st_size, stamps[st[stat.ST_MTIME]], st.st_ino, name)


def mlsd_blocks(tree, argument: bytes, view: ListView) -> Listing:
    """The Listing of MLSD; OSError (550) when the argument cannot be read, Refuse 501 when it is no directory.

    Compat: the original answers 550 for a file too; RFC 3659, 7.2.1, wants 501.
    """
    listing = Listing(view.max_files)
    try:
        path, fd = directory_argument(tree, argument)
    except NotADirectoryError:
        raise Refuse(501, "MLSD lists directories only, MLST tells about files") from None
    return listing.start(mlsd_produce(listing, tree, path, fd, view))


def mlsd_produce(listing, tree, path, fd, view):
    """The blocks of mlsd_blocks, an empty one first; closes `fd`."""
    stamps = Stamps()
    templates = Cache(lambda key: mlsd_template(view, *key))

    def other(name, st):
        here = path_join(path, name)
        return mlst_format(tree, here, name, tree.lstat(here) if name == b".." else st, view, stamps)

    try:
        yield b""
        for names in directory_names(fd, dots=True):
            lines = mlsd_lines(names, fd, templates, stamps, other)
            del lines[listing.limit - listing.count:]
            if lines:
                listing.count += len(lines)
                yield b"\r\n".join(lines) + b"\r\n"
            if listing.truncated:
                return
    finally:
        os.close(fd)


def mlsd_template(view, mode, device, uid, gid):
    """facts_template of files, directories and special files; None for links, which differ from one another."""
    if stat.S_ISLNK(mode):
        return None
    kind = b"file" if stat.S_ISREG(mode) else b"dir" if stat.S_ISDIR(mode) else b"unknown"
    return facts_template(view, kind, mode, device, uid, gid)


def mlsd_lines(names, fd, templates, stamps, other):
    """The lines of `names` in the open directory; `other(name, stat)` makes those that have no template. Hot loop."""
    lines = []
    add, lstat = lines.append, os.lstat
    for name in names:
        try:
            st = lstat(name, dir_fd=fd)
            mode, inode, device, _, uid, gid, size, _, mtime, _ = st
            template = templates[mode, device, uid, gid]
            if template and name not in DOTS:
                add(template % (size, stamps[mtime], inode, name))
            else:
                add(other(name, st))
        except OSError:
            continue
    return lines


# ==== Globs =======================================================================================
#
# The patterns of LIST: * ? [a-z] [!a-z] and backslash in each component of a path, matched against bytes. A compiled
# component is a tuple of items: an int is that byte, STAR is any number of bytes, a frozenset is one of its bytes.
#
# Patterns come from strangers. Matching one name takes at most pattern times name steps, and what is read from disk
# for all the patterns of a command is counted and limited, by -L, rather than timed.

STAR = None
ANY = frozenset(range(256))
MAX_STARS = 3  # Compat: GLOB_MAX_STARS; more of them match nothing


class GlobLimit(Exception):
    """The pattern asks for more than -L allows: it matches nothing."""


def glob_compile(component):
    """The items of one path component."""
    items = []
    at = 0
    closable = True  # once a [ finds no ], no later one will
    while at < len(component):
        byte = component[at]
        at += 1
        if byte == 0x5C and at < len(component):  # backslash
            items.append(component[at])
            at += 1
        elif byte == 0x2A:  # *
            if not items or items[-1] is not STAR:
                items.append(STAR)
        elif byte == 0x3F:  # ?
            items.append(ANY)
        elif byte == 0x5B and closable:  # [
            chosen, at = glob_set(component, at)
            closable = chosen is not None
            items.append(chosen if closable else byte)
        else:
            items.append(byte)
    return tuple(items)


def glob_set(component, at):
    """(bytes in the set that begins behind component[at - 1], where it ends); (None, at) if it is never closed."""
    negated = component[at:at + 1] == b"!"
    letters = []  # (byte, protected by a backslash)
    end = at + negated
    while True:
        protected = component[end:end + 1] == b"\\" and end + 1 < len(component)
        end += protected
        if end >= len(component):
            return None, at
        if component[end] == 0x5D and not protected and letters:
            break
        letters.append((component[end], protected))
        end += 1
    chosen = set()
    while letters:
        first = letters.pop(0)[0]
        if len(letters) > 1 and letters[0] == (0x2D, False):  # a range
            chosen.update(range(first, letters[1][0] + 1))
            del letters[:2]
        else:
            chosen.add(first)
    return (ANY - chosen if negated else frozenset(chosen)), end + 1


def glob_match(items, name):
    """True if `name` matches; at most len(items) * len(name) steps, as only the last star is ever tried again.

    A leading dot must be matched by a dot.
    """
    if name[:1] == b"." and items[:1] != (0x2E,):
        return False
    i = n = 0
    star, resume = -1, 0
    while n < len(name):
        item = items[i] if i < len(items) else -1
        if item is STAR:
            star, resume = i, n
            i += 1
        elif item == name[n] or isinstance(item, frozenset) and name[n] in item:
            i += 1
            n += 1
        elif star >= 0:
            resume += 1
            i, n = star + 1, resume
        else:
            return False
    return all(item is STAR for item in items[i:])


class Glob:
    """Expands the patterns of one command, and counts what that costs."""

    def __init__(self, tree, max_files, max_depth):
        self.tree = tree
        self.max_files = max_files
        self.max_depth = max_depth
        self.budget = 10 * max_files  # names read for all patterns of the command together

    def paths(self, pattern):
        """The paths that match and exist, sorted; GlobLimit. Without * ? [ this is the path itself, or nothing.

        Compat: reading more than `-L files` names, MAX_STARS or `-L depth` exceeded match nothing (sglob). The
        original also gives up at 64 KiB of results; we do not.
        """
        if pattern.count(b"*") > MAX_STARS:
            raise GlobLimit
        found = [b"/"] if pattern.startswith(b"/") else [b""]
        read = 0
        level = 1
        components = [part for part in path_tidy(pattern).split(b"/") if part]
        for number, component in enumerate(components, 1):
            slash = b"/" if number < len(components) or pattern.endswith(b"/") else b""
            items = glob_compile(component)
            if all(isinstance(item, int) for item in items):
                found = [path + bytes(items) + slash for path in found]
                continue
            level += 1
            if level >= 2 * self.max_depth:
                raise GlobLimit
            matching = []
            for path in found:
                for names in self.names(path, items):
                    read += len(names)
                    self.budget -= len(names)
                    if read > self.max_files or self.budget < 0:
                        raise GlobLimit
                    matching += [path + name + slash for name in names if glob_match(items, name)]
            found = matching
        return sorted(path for path in found if path and self.exists(path))

    def names(self, path, items):
        """The names below `path`, in batches, `.` and `..` too if the pattern could mean them; none if unreadable."""
        try:
            fd = directory_open(self.tree, path)
        except OSError:
            return
        try:
            yield from directory_names(fd, dots=items[0] == 0x2E)
        finally:
            os.close(fd)

    def exists(self, path):
        """True for what lstat finds; a path that ends in a slash must be a directory."""
        try:
            if path.endswith(b"/"):
                return stat.S_ISDIR(self.tree.stat(path).st_mode)
            self.tree.lstat(path)
        except OSError:
            return False
        return True


def path_tidy(path):
    """`path` without `//`, `/./` and leading `./`, as headers of LIST show it.

    Compat: simplify() also cuts `x/..` out of the text, and so lists the root for `x/..`; that is left to the tree.
    """
    head = b"/" if path.startswith(b"/") else b""
    tail = b"/" if path.endswith(b"/") else b""
    parts = [part for part in path.split(b"/") if part and part != b"."]
    if not parts:
        return head or b"."
    return head + b"/".join(parts) + tail


# ==== LIST ========================================================================================
#
# LIST, and STAT with a path, as the original's built-in ls prints them (ls.c): its options, its several paths, its
# order and columns, and its limits. Between names of files and lines there are two ways: `lines` is the loop for plain
# `ls -l` of files and directories, everything else (links, -F, -C, -1) goes through `entry`, one by one.
#
# LIST sorts, so it holds names (and stat results for -t and -S), but not many more than -L lets it show. Directories
# of -R wait on a list of our own: neither Python's stack nor the number of open directories grows with the depth.

def list_options(argument, options=""):
    """(letters, rest) of LIST's argument: the options in force, of "aCdFlRrSt", and what follows them.

    Compat: dolist: unknown letters and stray dashes are ignored; the last of l, 1, C counts, and of t, S.
    """
    letters = set(options + "l")
    rest = argument.lstrip(b" ")
    while rest.startswith(b"-"):
        end = 1
        while rest[end:end + 1].isalnum():
            letter = chr(rest[end])
            letters -= set({"l": "C", "1": "lC", "C": "l", "t": "S", "S": "t"}.get(letter, ""))
            letters |= set(letter) & set("aCdFlRrSt")
            end += 1
        rest = rest[end:].lstrip(b" ")
    return letters, rest


def list_words(rest):
    """The paths of LIST, separated by single blanks; backslash protects a blank, a brace and itself.

    Other backslashes stay, for glob_compile. Compat: unescape_and_return_next_file, empty words included.
    """
    words = [b""]
    position = 0
    while position < len(rest):
        letter = rest[position:position + 1]
        position += 1
        if letter == b" ":
            if position < len(rest):
                words.append(b"")
            continue
        if letter == b"\\" and rest[position:position + 1] in (b" ", b"\\", b"{", b"}"):
            letter = rest[position:position + 1]
            position += 1
        words[-1] += letter
    return words


def list_blocks(tree, argument: bytes, view: ListView, now=None) -> Listing:
    """The Listing of LIST, and the bare lines between the first and last of STAT's reply. Never refuses.

    `now`: seconds since 1970, which decide on time or year in dates.
    """
    listing = ListListing(tree, argument, view, time.time() if now is None else now)
    listing.blocks = blocks_collected(listing.pieces())
    return listing


def blocks_collected(pieces):
    """The same bytes in blocks of at least BLOCK, but for the last one."""
    block = []
    size = 0
    for piece in pieces:
        block.append(piece)
        size += len(piece)
        if size >= BLOCK:
            yield b"".join(block)
            block = []
            size = 0
    if block:
        yield b"".join(block)


class ListListing(Listing):
    """One LIST: its options, its caches, and how far it is."""

    def __init__(self, tree, argument, view, now):
        letters, self.rest = list_options(argument, "a" if view.show_dot_files else "")
        super().__init__(view.max_files, " ".join("-" + letter for letter in "aCdFlrRSt" if letter in letters))
        self.tree, self.view, self.letters = tree, view, letters
        self.long, self.columns, self.recursive = "l" in letters, "C" in letters, "R" in letters
        self.recent_from, self.recent_to = int(now) - HALF_YEAR, int(now) + HALF_YEAR
        self.times = Cache(lambda minute: list_date(minute * 60, b" %02d:%02d", 3, 5))
        self.years = Cache(lambda day: list_date(day * 86400, b" %5d", 0, 1))
        self.heads = Cache(lambda key: self.head(*key))

    def pieces(self):
        """The listing in pieces: files first, then directories, each under its name if there are several."""
        several = False
        for paths, more in self.targets():
            several = several or more
            directories = []
            lines = []
            for path in paths:
                try:
                    if "d" not in self.letters and stat.S_ISDIR(self.tree.stat(path).st_mode):
                        directories.append(path)
                        continue
                    self.tree.stat(path)  # Compat: dolist leaves out dangling links
                    line = self.entry(path, path, self.tree.lstat(path))[0]
                except OSError:
                    continue
                if line is not None and not name_hidden(path):
                    lines.append(line)
            yield self.show(lines)
            for path in directories:
                if not self.truncated:
                    if several:
                        yield b"\r\n\r\n" + path + b":\r\n\r\n"
                    yield from self.tree_pieces(path)

    def targets(self):
        """What LIST is to show, word by word: (paths, whether there is more than this one)."""
        rest = self.rest
        if not rest:
            yield [b"."], False
            return
        if any(letter in rest for letter in b" \\*?["):
            try:
                self.tree.lstat(rest)
            except OSError:
                pass
            else:  # Compat: dolist takes such names apart, but hardly any client knows how to protect them
                yield [rest], False
                return
        glob = Glob(self.tree, self.view.max_files, self.view.max_depth)
        words = list_words(rest)
        for word in filter(None, words):
            try:
                paths = glob.paths(word)
            except GlobLimit:
                self.note(b"Too much to look through for [%b]", word)
                continue
            yield paths, len(words) > 1 or len(paths) > 1

    def tree_pieces(self, top):
        """The pieces of the directory `top`, and of those below it with -R.

        Compat: at the depth of -L only the header of a directory appears (listdir).
        """
        pending = [(top, 0)]
        while pending and not self.truncated:
            path, depth = pending.pop()
            if depth:
                yield b"\r\n\r\n" + path + b":\r\n\r\n"
            if depth < self.view.max_depth:
                below = []
                yield from self.directory_pieces(path, below)
                if self.recursive:
                    pending += [(path + b"/" + name, depth + 1) for name in reversed(below)]

    def directory_pieces(self, path, below):
        """The pieces of one directory; `below` gets the names of those to descend into."""
        try:
            fd = directory_open(self.tree, path)
        except OSError:
            self.note(b"Unable to read [%b]", path)
            return
        try:
            names, stat_of = self.sorted_names(path, fd)
            step = len(names) or 1 if self.columns else BATCH
            for start in range(0, len(names), step):
                yield self.show(self.lines(path, names[start:start + step], stat_of, below))
                if self.truncated:
                    return
        finally:
            os.close(fd)

    def sorted_names(self, path, fd):
        """(names of an open directory in the order asked for, function from such a name to its lstat result).

        If there are too many names, these are the first: twice what -L shows, as what turns out to be a device or to
        have vanished is not shown.
        """
        by_stat = stat.ST_MTIME if "t" in self.letters else stat.ST_SIZE if "S" in self.letters else None
        keep = 2 * self.limit + BATCH
        hidden = "a" not in self.letters
        entries = []
        for names in directory_names(fd, dots=not hidden):
            if hidden:
                names = [name for name in names if name[0] != 0x2E]
            entries += names if by_stat is None else self.stated(path, fd, names)
            if len(entries) > keep + 10 * BATCH:
                self.sort(entries, by_stat)
                del entries[keep:]
        self.sort(entries, by_stat)
        if by_stat is not None:
            known = dict(entries)
            return list(known), known.__getitem__
        lstat = os.lstat
        return entries, (lambda name: lstat(name, dir_fd=fd)) if hidden else (lambda name: self.stat_at(path, fd, name))

    def sort(self, entries, by_stat):
        """Sort names, or (name, stat) with the latest or largest first; equals stay as they lie, in C as here."""
        if by_stat is None:
            entries.sort(reverse="r" in self.letters)
        else:
            entries.sort(key=lambda entry: entry[1][by_stat], reverse="r" not in self.letters)

    def stated(self, path, fd, names):
        """(name, lstat result as a plain tuple, which is smaller) for each name that is still there."""
        entries = []
        for name in names:
            try:
                entries.append((name, tuple(self.stat_at(path, fd, name))))
            except OSError:
                continue
        return entries

    def stat_at(self, path, fd, name):
        """lstat of a name in an open directory; `..` is the tree's affair, the root's must not show what is above."""
        return self.tree.lstat(path_join(path, name)) if name == b".." else os.lstat(name, dir_fd=fd)

    def lines(self, path, names, stat_of, below):
        """The lines of `names` in the directory `path`. Hot loop: what all of it costs is one stat and one format."""
        lines = []
        add, heads, times, years = lines.append, self.heads, self.times, self.years
        recent_from, recent_to, offset = self.recent_from, self.recent_to, self.view.utc_offset
        for name in names:
            try:
                st = stat_of(name)
            except OSError:
                continue
            mode, _, _, nlink, uid, gid, size, _, mtime, _ = st
            head = heads[mode, nlink, uid, gid]
            if head and size < 10000000000:
                local = mtime + offset
                add(b"%b%10d %b %b" % (head, size, times[local // 60] if recent_from <= mtime <= recent_to else
                                       years[local // 86400], name))
                continue
            line, descend = self.entry(path_join(path, name), name, st)
            if line is not None:
                add(line)
                if descend and name not in DOTS:
                    below.append(name)
        return lines

    def head(self, mode, nlink, uid, gid):
        """Mode, links and owners of a line that needs nothing else but size, date and name; b"" for all others."""
        kinds = (stat.S_IFREG,) if self.recursive else (stat.S_IFREG, stat.S_IFDIR)
        if not self.long or "F" in self.letters or stat.S_IFMT(mode) not in kinds:
            return b""
        return self.columns_of(mode, nlink, uid, gid)

    def columns_of(self, mode, nlink, uid, gid):
        """The columns of ls -l before the size."""
        return b"%b %4d %b %b " % (stat.filemode(mode).encode(), nlink, self.view.users[uid], self.view.groups[gid])

    def entry(self, path, name, st):
        """(line, whether -R descends) of any entry, `st` its lstat; (None, False) for devices, FIFOs and sockets.

        Compat: listfile: -R works with -l or -F only; -F looks at owner's and others' x; sizes of 11 digits on take 18.
        """
        if self.view.broken_clients and stat.S_ISLNK(st[stat.ST_MODE]):
            st = link_resolved(self.tree, path, st)
        mode, _, _, nlink, uid, gid, size, _, mtime, _ = st
        link, directory = stat.S_ISLNK(mode), stat.S_ISDIR(mode)
        if not (link or directory or stat.S_ISREG(mode)):
            return None, False
        classify = "F" in self.letters
        suffix = list_suffix(mode) if classify else b""
        if not self.long:
            return name + suffix, directory and classify
        local = mtime + self.view.utc_offset
        date = self.times[local // 60] if self.recent_from <= mtime <= self.recent_to else self.years[local // 86400]
        line = self.columns_of(mode, nlink, uid, gid)
        line += (b"%10d %b %b" if size < 10000000000 else b"%18d %b %b") % (size, date, name)
        if link:
            target = link_target(self.tree, path) or b".."
            line += b" -> " + bytes(0x5F if byte in CONTROLS else byte for byte in target)  # Compat: raw in ls.c
            suffix = list_suffix(link_resolved(self.tree, path, st)[stat.ST_MODE]) if classify else b""
            suffix = b"" if suffix == b"@" else suffix
        return line + suffix, directory

    def show(self, lines):
        """The bytes of one batch of lines, as many as -L still allows; in columns with -C."""
        del lines[max(0, self.limit - self.count):]
        self.count += len(lines)
        if self.columns:
            lines = list_columns(lines)
        return b"".join((b"\r\n".join(lines), b"\r\n")) if lines else b""


def list_date(local, form, first, last):
    """Month, day, and fields first:last of the local time in `form`: b"Nov 14 22:13" or b"Nov 14  2023"."""
    moment = civil_time(local)
    return b"%b %2d" % (MONTHS[moment[1]], moment[2]) + form % moment[first:last]


def list_suffix(mode):
    """What -F puts behind a name. Compat: a link to a FIFO gets a star too, its bit is in the mask (listfile)."""
    return b"@" if stat.S_ISLNK(mode) else b"/" if stat.S_ISDIR(mode) else b"*" if mode & 0o10101 else b""


def list_columns(names):
    """The lines of -C: columns of equal width, filled downwards, tabs between them, 75 wide (outputfiles)."""
    width = (max(map(len, names), default=0) | 7) + 1
    rows = -(-len(names) // max(1, 75 // width))
    lines = []
    for row in range(rows):
        cells = names[row::rows]
        padded = [cell + b"\t" * ((width + 7 - len(cell)) // 8) for cell in cells[:-1]]
        lines.append(b"".join(padded + cells[-1:]))
    return lines

# ==== Quotas ======================================================================================
# `.ftpquota` in the root of an account's files says what the account holds: "FILES BYTES\n", as the original writes
# it. It is opened for each look (an administrator may replace it), created by the first one, locked with fcntl(2),
# and overwritten in place: what is left of a longer line behind the first newline means nothing, so that no reader,
# and no crash, ever meets an empty or a shorter number. A file that cannot be read or understood refuses uploads;
# taking away is always allowed.
#
# Whoever adds or removes a name does so inside `with quota.lock() as account`, so that what is counted is what
# happens, whatever the other sessions of the account do. Adding is charged before, removing after it happened, and an
# upload writes only bytes that it has reserved: the sum of all sessions never passes the limit, and what a kill -9
# leaves is counted too high (by the reservation, at most QUOTA_STEP, and one file), never too low. An upload holds
# its file with flock(2), because only the session that writes it knows how much of it is paid: who removes the name
# meanwhile gives back the file, and the writer, who sees that no name is left, the bytes.

QUOTA_FILE = b".ftpquota"
QUOTA_TEMPORARY = b".pureftpd-"         # names of ours begin with it
QUOTA_FIRST_STEP = 1 << 16              # bytes reserved when an upload starts: a small file needs no more
QUOTA_STEP = 1 << 24                    # bytes reserved at once later on, but never more than ...
QUOTA_LOCK_SECONDS = 5.0                # how long a lock of somebody else is waited for ...
QUOTA_LOCK_PAUSE = 0.001                # ... trying so often
QUOTA_SHARE = 16                        # ... one part in so many of what is left: other sessions want some too


def quota_lock(fd: int) -> None:
    """Lock an open quota file as the original does (fcntl(2)). Raises OSError when somebody holds it for too long.

    A process of the user's own may hold it for ever, and would stop sessions, and root's quotacheck, with it.
    """
    import fcntl
    deadline = time.monotonic() + QUOTA_LOCK_SECONDS
    while True:
        try:
            fcntl.lockf(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
            return
        except OSError as error:
            if error.errno not in (errno.EACCES, errno.EAGAIN):
                raise
        if time.monotonic() > deadline:
            raise OSError(errno.EAGAIN, "another process keeps it locked")
        time.sleep(QUOTA_LOCK_PAUSE)


def quota_forbids(path: bytes) -> bool:
    """Whether an account with a quota may not touch `path`: our own files, in any case a file system might ignore."""
    path = path.lower()
    return QUOTA_FILE in path or any(name.startswith(QUOTA_TEMPORARY) for name in path.split(b"/"))


def quota_parse(data: bytes) -> "tuple[int, int]":
    """(files, bytes) as a quota file says, 0 and 0 for an empty one. Raises ValueError.

    Compat: 1.0.50 takes any malformed file for "0 0"; see the theory above.
    """
    if not data:
        return 0, 0
    numbers = data.partition(b"\n")[0].split()
    if len(numbers) != 2 or not all(n.isdigit() and len(n) <= 20 for n in numbers):
        raise ValueError("it is not \"FILES BYTES\" but \"%s\"" % printable(data[:42].rstrip(b"\n")))
    return int(numbers[0]), int(numbers[1])


def quota_store(fd: int, files: int, size: int, length: int) -> int:
    """Overwrite a locked quota file of `length` bytes or more; how many it has now. Raises OSError."""
    line = b"%d %d\n" % (files, size)
    if os.pwrite(fd, line, 0) != len(line):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
    if length > len(line):
        os.ftruncate(fd, len(line))
    return len(line)


class Quota:
    """The limits of one account, None for none, and the way to what it holds. Without limits nothing is counted."""

    def __init__(self, tree: Any, files: "int | None", size: "int | None", log: Any) -> None:
        self.tree, self.log = tree, log
        self.files, self.size = files, size         # limits: files and directories; bytes
        self.limited = files is not None or size is not None
        self.locked = self.complained = False

    def lock(self) -> "QuotaAccount":
        """Not twice at a time: the second descriptor's close(2) would end the first one's lock (fcntl(2))."""
        return QuotaAccount(self)

    def complain(self, what: str) -> None:
        """Tell the log, once a session."""
        if not self.complained:
            self.complained = True
            self.log.warning(f"quota file /{QUOTA_FILE.decode()}: {what}; uploads are refused until it can be used: "
                             "run quotacheck for this account")

    def lines(self, account: "QuotaAccount | None" = None) -> "list[str]":
        """What the replies 226, 230, 250 and 257 tell of the quota: the original's words, which clients read."""
        if account is None:
            with self.lock() as account:
                pass
        lines = []
        if not account.broken and self.files is not None:
            lines.append(f"{account.files} files used ({quota_percent(account.files, self.files)}%)"
                         f" - authorized: {self.files} files")
        if not account.broken and self.size is not None:
            lines.append(f"{account.size // 1024} Kbytes used ({quota_percent(account.size, self.size)}%)"
                         f" - authorized: {self.size // 1024} Kb")
        return lines


def quota_percent(used: int, limit: int) -> int:
    return used * 100 // limit if limit else 100


class QuotaAccount:
    """What an account holds, while it is locked: `with quota.lock() as account`. The numbers can be read afterwards."""

    def __init__(self, quota: Quota) -> None:
        self.quota = quota
        self.fd = -1
        self.files = self.size = 0                  # held: files and directories; bytes
        self.length = 0                             # of the quota file
        self.broken = ""                            # why the numbers mean nothing

    def __enter__(self) -> "QuotaAccount":
        if self.quota.locked:
            raise RuntimeError("the quota is locked already")
        self.quota.locked = True
        if self.quota.limited:
            try:
                self.fd = self.quota.tree.open(b"/" + QUOTA_FILE, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW, 0o600)
                if not stat.S_ISREG(os.fstat(self.fd).st_mode):
                    raise ValueError("it is not a regular file")
                quota_lock(self.fd)
                line = os.pread(self.fd, 84, 0)
                self.length = len(line)
                self.files, self.size = quota_parse(line)
            except (OSError, ValueError) as error:
                self.fail(error)
        return self

    def __exit__(self, *_: object) -> None:
        self.quota.locked = False
        if self.fd != -1:
            os.close(self.fd)                       # and with it goes the lock
            self.fd = -1

    def fail(self, error: Exception) -> None:
        self.broken = getattr(error, "strerror", None) or str(error)
        self.quota.complain(self.broken)

    def charge(self, files: int, size: int) -> None:
        """Add to what the account holds, or take from it, down to 0."""
        files, size = max(0, self.files + files), max(0, self.size + size)
        if self.fd == -1 or self.broken or (files, size) == (self.files, self.size):
            return
        try:
            self.length = quota_store(self.fd, files, size, self.length)
        except OSError as error:
            self.fail(error)
        else:
            self.files, self.size = files, size

    def claim(self, files: int, freed: int = 0) -> None:
        """Charge `files` that are about to be made, while `freed` bytes are about to go. Raises Refuse.

        Compat: no free file refuses also who only wants to overwrite one (dostor).
        """
        limit = self.quota
        full = ((limit.files is not None and self.files >= limit.files)
                or (limit.size is not None and self.size - freed > limit.size))
        if not self.broken and full:
            raise Refuse(552, "Quota exceeded, nothing has been stored")
        self.charge(files, 0)
        if self.broken:
            raise Refuse(451, "The quota of this account cannot be read, nothing is stored: tell the administrator")

    def allows(self, size: int) -> bool:
        """Whether one more file of `size` bytes would do (ALLO)."""
        limit = self.quota
        return (not self.broken and (limit.files is None or self.files < limit.files)
                and (limit.size is None or self.size < limit.size and size <= limit.size - self.size))

    def counted(self, path: bytes) -> int:
        """The bytes to give back when the name `path` goes: 0 for a directory, or a file being written. OSError."""
        if not self.quota.limited:
            return 0
        st = self.quota.tree.lstat(path)
        if stat.S_ISDIR(st.st_mode) or stat.S_ISREG(st.st_mode) and self.is_written(path):
            return 0
        return st.st_size

    def is_written(self, path: bytes) -> bool:
        """Whether an upload holds the file."""
        import fcntl
        try:
            fd = self.quota.tree.open(path, os.O_RDONLY | os.O_NOFOLLOW)
        except OSError:
            return False
        try:
            fcntl.flock(fd, fcntl.LOCK_SH | fcntl.LOCK_NB)
        except OSError as error:
            return error.errno == errno.EWOULDBLOCK
        finally:
            os.close(fd)
        return False

    def hold(self, fd: int) -> bool:
        """Take a file for an upload, until its meter is settled or `fd` closed; False when another session does."""
        import fcntl
        try:
            fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            return error.errno != errno.EWOULDBLOCK         # a file system without locks: nobody holds anything
        return True

    def meter(self, fd: int, before: int, offset: int) -> "QuotaMeter":
        """The meter of an upload into `fd`: a file that is held, had `before` bytes, and has been cut down to `offset`.

        What has been cut off, as far as it was counted, is this upload's to use, but for more than it may need.
        """
        freed = min(before - offset, self.size)
        self.charge(0, -max(0, freed - QUOTA_STEP))
        meter = QuotaMeter(self.quota, fd, offset, offset + min(freed, QUOTA_STEP))
        meter.reserve(self, QUOTA_FIRST_STEP, 0)
        return meter


class QuotaMeter:
    """How much one upload may write."""

    def __init__(self, quota: Quota, fd: int, size: int, paid: int) -> None:
        self.quota, self.fd = quota, fd
        self.size = size                # bytes the file has, when everything granted is written
        self.paid = paid                # bytes of the file that the account has been charged with

    def room(self, wanted: int) -> int:
        """How many of `wanted` bytes at hand may be written now, and count them as written: "full" if that is less."""
        if not self.quota.limited:
            return wanted
        if self.paid - self.size < wanted:
            with self.quota.lock() as account:
                self.reserve(account, QUOTA_STEP, wanted)
        granted = max(0, min(wanted, self.paid - self.size))
        self.size += granted
        return granted

    def reserve(self, account: QuotaAccount, step: int, wanted: int) -> None:
        """Charge ahead: what `wanted` lacks, or `step`, or the share of one session, as far as the limit allows."""
        free = QUOTA_SHARE * QUOTA_STEP if self.quota.size is None else self.quota.size - account.size
        paid = self.paid - self.size
        more = max(0, min(free, max(wanted, min(step, free // QUOTA_SHARE)) - paid))
        account.charge(0, more)
        if not account.broken:
            self.paid += more

    def settle(self, account: QuotaAccount) -> None:
        """Charge what the file has really become, complete or not, and let go of it. Comes before close(2) of `fd`."""
        if not self.quota.limited:
            return
        import fcntl
        st = os.fstat(self.fd)
        size = st.st_size if st.st_nlink else 0         # who removed its name has given back the file, not the bytes
        account.charge(0, size - self.paid)
        self.size = self.paid = size
        try:
            fcntl.flock(self.fd, fcntl.LOCK_UN)
        except OSError:
            pass                                        # a file system without locks


# ==== Ratios and bandwidth ========================================================================
# Pure arithmetic: what was moved and what time it is come in, what may be moved comes out.
#
# A Throttle counts in time: every byte takes 1 / rate seconds, and `paid_until` is when those that went so far are
# paid. It lets a slice (THROTTLE_SLICE seconds' worth) go ahead of that moment, then nothing until the moment has
# come. So a busy transfer wakes up some 20 times a second at any rate, a late wake-up is made up for by the next
# slice, and a transfer that stood still may catch up THROTTLE_BEHIND seconds of what it missed and no more.

THROTTLE_SLICE = 0.05               # seconds
THROTTLE_BEHIND = 0.2               # seconds
THROTTLE_LEAST = 1460               # bytes: slices of slow rates are larger, up to a quarter of a second
THROTTLE_BUFFER_MAX = 1 << 20       # bytes; faster receivers keep the kernel's own sizes


def ratio_allows(ratio_ul: int, ratio_dl: int, uploaded: int, downloaded: int, length: int) -> bool:
    """Whether `length` bytes more may be downloaded; counters are the session's, a ratio of 0 is none (doretr)."""
    return not (ratio_ul and ratio_dl) or (downloaded + length) // ratio_dl <= uploaded // ratio_ul


def ratio_denial(ratio_ul: int, ratio_dl: int, uploaded: int, downloaded: int) -> "list[str]":
    """The lines of the 550 that ratio_allows() asks for."""
    return [f"For every {ratio_dl} bytes downloaded, {ratio_ul} have to be uploaded.",
            f"This session has uploaded {uploaded // 1024} Kb and downloaded {downloaded // 1024} Kb:",
            "upload something, then try again."]


def throttle_buffer(rate: int) -> int:
    """SO_RCVBUF, in bytes, for a data socket that is to receive `rate` bytes/s; 0: leave it alone.

    The kernel fills its buffer at full speed, however slowly we read. To be set before listen() or connect().
    """
    size = max(4096, rate // 4)
    return size if rate and size < THROTTLE_BUFFER_MAX else 0


class Throttle:
    """The pace of one transfer. `rate` is in bytes/s, 0 for none; every `now` is a time.monotonic()."""

    def __init__(self, rate: int, now: float) -> None:
        self.rate = rate
        self.slice = max(THROTTLE_SLICE, min(THROTTLE_LEAST / rate, 0.25)) if rate else 0.0         # seconds
        self.paid_until = now

    def allowance(self, now: float) -> int:
        """How many bytes may go at once; 0: wait(). Large when there is no limit."""
        if not self.rate:
            return sys.maxsize
        self.paid_until = max(self.paid_until, now - THROTTLE_BEHIND)
        ahead = self.slice - (self.paid_until - now)                                                # seconds
        return max(1, int(ahead * self.rate)) if ahead > self.slice / 4 else 0

    def spend(self, count: int) -> None:
        """`count` bytes went."""
        if self.rate:
            self.paid_until += count / self.rate

    def wait(self, now: float) -> float:
        """Seconds until a whole slice may go. After the last byte: until the transfer has taken the time it should."""
        return max(0.0, self.paid_until - now) if self.rate else 0.0

# ==== Transfer logs ===============================================================================
# Logs of what was done with files, for programs to read: -O FORMAT:PATH, several at once. clf, w3c, stats and xferlog
# are the original's, byte for byte, a line for each transfer that moved or could have moved data; json tells of every
# event, an object a line.
#
# The login child opens them as root, before chroot, and a session keeps nothing but descriptors. A line is one write(2)
# to the end of a file opened with O_APPEND, under a fcntl(2) lock that the original takes too; a line that did not fit
# on the disk is taken back. Whatever is wrong with a log harms no session: it is told to the system's log once. A
# session cannot reopen a file that logrotate(8) has moved away: now and then it asks PRIV for a fresh
# descriptor and gives it to transferlog_renew().
#
# No name may forge a field or a line, and every line tells the name again: a path is percent-encoded, or has its
# control bytes as \xNN and the backslash doubled (the original knows no name with one). Only xferlog has always
# made blanks and control bytes `_`.

TRANSFERLOG_LOCK_TRIES = 50             # a millisecond apart: then the line is written all the same
TRANSFERLOG_MONTHS = (b"Jan", b"Feb", b"Mar", b"Apr", b"May", b"Jun", b"Jul", b"Aug", b"Sep", b"Oct", b"Nov", b"Dec")
TRANSFERLOG_DAYS = (b"Mon", b"Tue", b"Wed", b"Thu", b"Fri", b"Sat", b"Sun")


class Transfer(NamedTuple):
    """One transfer, as the logs tell it."""
    upload: bool
    path: bytes                 # as root sees it: session's root + path in it; b"1.2.3.4:/x" in a virtual host
    size: int                   # bytes that were moved
    seconds: float
    user: bytes                 # b"ftp" when anonymous
    host: str                   # name or address of the client
    session_start: float        # time.time() at which the session began
    ascii: bool = False
    complete: bool = True


class TransferLog:
    """One open log."""

    def __init__(self, fd: int, form: str, path: str, log: Any, index: int = 0) -> None:
        self.fd, self.form, self.path, self.log = fd, form, path, log
        self.index = index                              # its place in options.altlog, whether or not the others could be opened
        self.failed = False

    def write(self, lines: bytes, if_empty: bool = False) -> None:
        """Append `lines`, whole or not at all, and complain once when that fails. `if_empty`: only to an empty file."""
        import fcntl
        locked = self.lock()
        try:
            if if_empty and os.fstat(self.fd).st_size:
                return
            written = os.write(self.fd, lines)
            if written != len(lines):
                os.ftruncate(self.fd, os.fstat(self.fd).st_size - written)
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        except OSError as error:
            if not self.failed:
                self.failed = True
                self.log.warning(f"transfer log {self.path}: {error.strerror}; its lines are being lost")
        finally:
            if locked:
                fcntl.lockf(self.fd, fcntl.LOCK_UN)

    def lock(self) -> bool:
        """Whether the file is ours alone. Not tried for ever: who stops his own process must not stop others."""
        import fcntl
        for _ in range(TRANSFERLOG_LOCK_TRIES):
            try:
                fcntl.lockf(self.fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
                return True
            except OSError as error:
                if error.errno not in (errno.EACCES, errno.EAGAIN):
                    return False
            time.sleep(0.001)
        return False


# ---- opening, as root ----------------------------------------------------------------------------


def transferlogs_open(altlog: "tuple[tuple[str, str], ...]", log: Any) -> "list[TransferLog]":
    """The logs of options.altlog, in its order, without those that cannot be opened (`log` is told why)."""
    logs = []
    for index, (form, path) in enumerate(altlog):
        try:
            logs.append(TransferLog(transferlog_open(path), form, path, log, index))
        except OSError as error:
            log.error(f"transfer log {path}: {error.strerror}")
        else:
            transferlog_begin(logs[-1])
    return logs


def transferlog_open(path: str) -> int:
    """A descriptor to append to `path`. Raises OSError, also for a link and for what is not a regular file."""
    flags = os.O_WRONLY | os.O_CREAT | os.O_APPEND | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_NOCTTY | os.O_CLOEXEC
    fd = os.open(path, flags, 0o600)
    if not stat.S_ISREG(os.fstat(fd).st_mode):
        os.close(fd)
        raise OSError(errno.EINVAL, "not a regular file")
    return fd


def transferlog_begin(log: TransferLog) -> None:
    """Give an empty w3c log its header. Compat: also one that logrotate(8) made (the original: one it makes itself)."""
    if log.form == "w3c":
        log.write(b"#Software: pureftpd.py %b\n"
                  b"#Version: 1.0\n"
                  b"#Date: %b\n"
                  b"#Fields: date time c-ip cs-method cs-uri-stem sc-status cs-username sc-bytes\n"
                  % (VERSION.encode(), transferlog_utc(time.time())), if_empty=True)


def transferlog_renew(log: TransferLog, fd: int) -> None:
    """Go on with `fd`, a fresh descriptor of the log's path, when the log has been moved away; it is closed here."""
    if not os.path.samestat(os.fstat(fd), os.fstat(log.fd)):
        os.dup2(fd, log.fd, inheritable=False)
        log.failed = False
        transferlog_begin(log)
    os.close(fd)


# ---- lines ---------------------------------------------------------------------------------------


def escapes(special: bytes, escape: "Callable[[int], bytes]") -> "list[bytes]":
    """What stands for each of the 256 bytes: escape(byte) for `special` and control bytes."""
    return [escape(b) if b < 32 or b == 127 or b in special else bytes((b,)) for b in range(256)]


URL_PLAIN = b"abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ0123456789./_-"
URL_ESCAPES = escapes(bytes(set(range(256)) - set(URL_PLAIN)), lambda b: b"%%%02X" % b)
WORD_ESCAPES = escapes(b' "%', lambda b: b"%%%02X" % b)
STATS_ESCAPES = escapes(b"\\", lambda b: b"\\\\" if b == 92 else b"\\x%02x" % b)
XFERLOG_ESCAPES = escapes(b" ", lambda b: b"_")


def escaped(data: bytes, table: "list[bytes]") -> bytes:
    if not data.translate(None, URL_PLAIN):         # most names: nothing in them is special anywhere
        return data
    return b"".join([table[b] for b in data])


def transferlog_words(transfer: Transfer) -> "tuple[bytes, bytes]":
    """User and host as one field each. Compat: blanks, quotes and % are raw in the original, and forge fields."""
    return escaped(transfer.user, WORD_ESCAPES) or b"-", escaped(os.fsencode(transfer.host), WORD_ESCAPES) or b"-"


def transferlog_utc(now: float) -> bytes:
    return b"%d-%02d-%02d %02d:%02d:%02d" % time.gmtime(now)[:6]


def transferlog_clf(transfer: Transfer, now: float) -> bytes:
    user, host = transferlog_words(transfer)
    tm = time.localtime(now)
    minutes = tm.tm_gmtoff // 60
    zone = (b"+" if minutes > 0 else b"-") + b"%02d%02d" % divmod(abs(minutes), 60)     # Compat: UTC is -0000
    return b'%b - %b [%02d/%b/%d:%02d:%02d:%02d %b] "%b %b" 200 %d\n' % (
        host, user, tm.tm_mday, TRANSFERLOG_MONTHS[tm.tm_mon - 1], tm.tm_year, tm.tm_hour, tm.tm_min, tm.tm_sec, zone,
        b"PUT" if transfer.upload else b"GET", escaped(transfer.path, URL_ESCAPES), transfer.size)


def transferlog_stats(transfer: Transfer, now: float) -> bytes:
    user, host = transferlog_words(transfer)
    return b"%d %x.%x %b %b %b %d %d %b\n" % (
        now, int(transfer.session_start), os.getpid(), user, host, b"U" if transfer.upload else b"D",
        transfer.size, transfer.seconds + 0.5, escaped(transfer.path, STATS_ESCAPES))


def transferlog_w3c(transfer: Transfer, now: float) -> bytes:
    user, host = transferlog_words(transfer)
    return b"%b %b []%b %b 226 %b %d\n" % (
        transferlog_utc(now), host, b"created" if transfer.upload else b"sent", escaped(transfer.path, URL_ESCAPES),
        user, transfer.size)


def transferlog_xferlog(transfer: Transfer, now: float) -> bytes:
    """xferlog(5), but for its end. Compat: who is anonymous is "r" and "ftp" too (altlog_writexfer_xferlog)."""
    user, host = transferlog_words(transfer)
    tm = time.localtime(now)
    return b"%b %b %02d %02d:%02d:%02d %d %d %b %d %b %b _ %b r %b ftp 1 * c\n" % (
        TRANSFERLOG_DAYS[tm.tm_wday], TRANSFERLOG_MONTHS[tm.tm_mon - 1], tm.tm_mday, tm.tm_hour, tm.tm_min, tm.tm_sec,
        tm.tm_year, transfer.seconds + 0.5, host, transfer.size, escaped(transfer.path, XFERLOG_ESCAPES),
        b"a" if transfer.ascii else b"b", b"i" if transfer.upload else b"o", user)


def transferlog_json(transfer: Transfer, now: float) -> bytes:
    return json_event("upload" if transfer.upload else "download", transfer.user, transfer.host, transfer.session_start,
                      now, path=transfer.path, bytes=transfer.size, seconds=round(transfer.seconds, 3),
                      complete=transfer.complete)


TRANSFERLOG_FORMATS: "dict[str, Callable[[Transfer, float], bytes]]" = {
    "clf": transferlog_clf,
    "stats": transferlog_stats,
    "w3c": transferlog_w3c,
    "xferlog": transferlog_xferlog,
    "json": transferlog_json,
}


def json_event(event: str, user: bytes, host: str, session_start: float, now: float, **details: Any) -> bytes:
    """The line of one event. `session` is START.PID as in the stats format."""
    return json_line({"time": round(now, 3), "event": event, "session": "%x.%x" % (int(session_start), os.getpid()),
                      "user": user, "host": host, **details})


def json_line(fields: "dict[str, Any]") -> bytes:
    """A JSON object of str, bytes, numbers and bool. What is no UTF-8 is shown with U+FFFD, and exactly as KEY_hex."""
    parts = []
    for key, value in fields.items():
        if isinstance(value, bytes):
            text = value.decode("utf-8", "replace")
            parts.append(json_string(key) + ":" + json_string(text))
            if text.encode() != value:
                parts.append(json_string(key + "_hex") + ':"' + value.hex() + '"')
        else:
            json = json_string(value) if isinstance(value, str) else repr(value).lower()    # True, 12, 0.25
            parts.append(json_string(key) + ":" + json)
    return ("{" + ",".join(parts) + "}\n").encode()


def json_string(text: str) -> str:
    """`text` in quotes; whatever is not printable as \\uNNNN, so that no terminal obeys it."""
    if text.isprintable() and '"' not in text and "\\" not in text:
        return '"' + text + '"'
    quoted = []
    for char in text:
        if char in '"\\':
            char = "\\" + char
        elif not char.isprintable():
            code = ord(char)                        # by hand: a session in its chroot cannot load the codec of UTF-16
            units = (code,) if code < 0x10000 else (0xD7C0 + (code >> 10), 0xDC00 + (code & 0x3FF))
            char = "".join("\\u%04x" % unit for unit in units)
        quoted.append(char)
    return '"' + "".join(quoted) + '"'


def transferlog_write(logs: "list[TransferLog]", transfer: Transfer) -> None:
    """Tell every log of a transfer, complete or not."""
    now = time.time()
    for log in logs:
        log.write(TRANSFERLOG_FORMATS[log.form](transfer, now))


def transferlog_event(logs: "list[TransferLog]", event: str, user: bytes, host: str, session_start: float,
                      **details: Any) -> None:
    """Tell the json logs of anything else: login, refusal (reason=), delete, rename (path=, to=), mkdir, logout ..."""
    for log in logs:
        if log.form == "json":
            log.write(json_event(event, user, host, session_start, time.time(), **details))

# ==== State directory =============================================================================
# StateDir holds what the processes of one server share: the scoreboard (next section), the upload pipe, the empty
# directory SERVER is caged in. Who can write in it could plant links and FIFOs for root to open, so it is ours alone:
# mode 0700, owned by the user the server was started as, no link. Every file in it is opened relative to a descriptor
# of the checked directory, and that descriptor is closed again before anything of a client's is read.


def statedir_default() -> str:
    """The directory used without --statedir: the system's for root, a private one for other users."""
    if os.geteuid() == 0:
        return "/run/pure-ftpd" if os.path.isdir("/run") else "/var/run/pure-ftpd"
    runtime = os.environ.get("XDG_RUNTIME_DIR", "")
    if runtime.startswith("/") and os.access(runtime, os.W_OK):
        return runtime.rstrip("/") + "/pure-ftpd"
    return f"/tmp/pure-ftpd-{os.geteuid()}"


def statedir_prepare(statedir: str) -> None:
    """Make `statedir` if it is missing, and private. Raises ConfigError if it is, or could be, somebody else's.

    Compat: only "not writable by others" is asked for, and 0755 made 0700 (ftpwho_initwho): systemd's
    RuntimeDirectory= makes it 0755.
    """
    try:
        os.mkdir(statedir, 0o700)
    except FileExistsError:
        pass
    except OSError as error:
        raise ConfigError(f"StateDir {statedir}: cannot create it: {error.strerror}") from None
    directory = statedir_open(statedir)
    try:
        os.fchmod(directory, 0o700)
    finally:
        os.close(directory)


def statedir_empty(statedir: str) -> str:
    """The empty directory in which processes are caged, made with StateDir where it is missing: cleaners of old files, and
    the end of a login, remove what they think nobody needs. Raises ConfigError.
    """
    empty = os.path.join(statedir, "empty")
    if not os.path.isdir(empty):
        statedir_prepare(statedir)
        try:
            os.makedirs(empty, 0o755, exist_ok=True)
        except OSError as error:
            raise ConfigError(f"{empty}: {error.strerror}") from None
    return empty


def statedir_open(statedir: str, reading: bool = False) -> int:
    """A descriptor of the checked directory. Raises ConfigError: missing, a link, writable by others, not ours.

    With `reading`, root may look at the directory of another user's server.
    """
    flags = os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC
    try:
        directory = os.open(statedir.rstrip("/") or "/", flags)         # "link/" would follow the link
    except OSError as error:
        why = "not a directory, or a link to one" if error.errno in (errno.ENOTDIR, errno.ELOOP) else error.strerror
        raise ConfigError(f"StateDir {statedir}: {why}") from None
    found = os.fstat(directory)
    euid = os.geteuid()
    if found.st_uid != euid and not (reading and euid == 0):
        wrong = f"owned by uid {found.st_uid}, not by this user (uid {euid})"
    elif found.st_mode & 0o022:
        wrong = f"writable by others (mode {stat.S_IMODE(found.st_mode):04o}): it must be 0700"
    else:
        return directory
    os.close(directory)
    raise ConfigError(f"StateDir {statedir}: {wrong}")


# ==== Scoreboard ==================================================================================
# Who is logged in and what they transfer, for ftpwho and for the limit of sessions per user: one file per session,
# StateDir/client-%08lu (its pid), mode 0600, in the layout of the original's FTPWhoEntry, so that either ftpwho reads
# either server. The login child makes the file as root; afterwards the session, no longer root, writes its own entry
# through the descriptor it kept, and PRIV removes the file when the process is gone.
#
# Nobody waits for anybody: an entry is written by one pwrite, without a lock, and what a reader finds is only shown.
# The session is the user's, so its entry is not believed further than that: the pid is the one in the file's name,
# lengths and signs are checked, links and FIFOs are not opened. Reading tidies up: entries of dead processes go.
# Compat: the original has an entry ("?") for each connection; here only for sessions, as visitors have no process.

SCOREBOARD_FREE, SCOREBOARD_IDLE, SCOREBOARD_DOWNLOAD, SCOREBOARD_UPLOAD = range(4)

# state, pid, client's and server's sockaddr_storage, start of session, of transfer, restart offset, total, current
# size (bytes), account, file name; the strings end with a zero byte. Native order and no gaps: 1456 bytes, as 1.0.54.
# Compat: Debian's 1.0.50 has one byte more for the account, and so 1464 bytes: read, but not written.
SCOREBOARD_LAYOUT = struct.Struct("=ii128s128sqqqqq128s1024s")
SCOREBOARD_LAYOUT_DEBIAN = struct.Struct("=ii128s128sqqqqq129s1024s7x")
SCOREBOARD_CURRENT = struct.Struct("=q")
SCOREBOARD_CURRENT_AT = 296
SCOREBOARD_ACCOUNT_AT, SCOREBOARD_ACCOUNT_SIZE = 304, 128


class ScoreboardRecord(NamedTuple):
    """One session as scoreboard_read finds it. Stamps as time.time(), sizes in bytes, never negative."""

    pid: int
    state: int                      # SCOREBOARD_*; others are possible in damaged entries
    peer: "tuple[str, int]"         # address and port of the client; ("", 0) unknown
    local: "tuple[str, int]"        # of the server
    since: int                      # start of the session
    started: int                    # start of the transfer
    restart: int                    # offset the transfer began at
    total: int                      # size of the file, downloads only
    current: int                    # offset reached
    account: bytes                  # b"?" before login
    filename: bytes                 # as the client named it; its end if it is longer than 1023 bytes


def scoreboard_name(pid: int) -> str:
    return f"client-{pid:08d}"


def sockaddr_pack(address: str, port: int) -> bytes:
    """`address` as a Linux sockaddr_in or sockaddr_in6; empty when it is neither."""
    host, _, zone = address.partition("%")
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    try:
        packed = socket.inet_pton(family, host)
        scope = int(zone) if zone.isdigit() else socket.if_nametoindex(zone) if zone else 0
    except OSError:
        return b""
    head = struct.pack("=H", family) + struct.pack("!H", port)
    return head + (bytes(4) + packed + struct.pack("=I", scope) if family == socket.AF_INET6 else packed)


def sockaddr_unpack(data: bytes) -> "tuple[str, int]":
    """(address, port) of what sockaddr_pack or the original stored; ("", 0) for anything else."""
    family, port = struct.unpack_from("=H", data)[0], struct.unpack_from("!H", data, 2)[0]
    if family == socket.AF_INET:
        return socket.inet_ntop(family, data[4:8]), port
    if family == socket.AF_INET6:
        scope = struct.unpack_from("=I", data, 24)[0]
        return socket.inet_ntop(family, data[8:24]) + (f"%{scope}" if scope else ""), port
    return "", 0


class ScoreboardEntry:
    """The session's own entry. Its methods never raise OSError: a full disk must not end a transfer."""

    def __init__(self, descriptor: int, pid: int, peer: Any, since: float):
        self.descriptor = descriptor
        self.pid = pid
        self.since = int(since)
        self.addresses = (sockaddr_pack(peer.address, peer.port), sockaddr_pack(peer.local_address, peer.local_port))
        self.account = b"?"

    def login(self, account: bytes) -> None:
        """The session belongs to `account` from now on."""
        self.account = account[:SCOREBOARD_ACCOUNT_SIZE - 1]
        self.update(SCOREBOARD_IDLE)

    def update(self, state: int, filename: bytes = b"", total: int = 0, restart: int = 0, current: int = 0,
               now: "float | None" = None) -> None:
        """What the session does from now on, in one write."""
        started = int(time.time() if now is None else now)
        self.write(SCOREBOARD_LAYOUT.pack(state, self.pid, *self.addresses, self.since, started, restart, total,
                                          current, self.account, filename[-1023:]), 0)

    def progress(self, current: int) -> None:
        """The transfer has reached offset `current`."""
        self.write(SCOREBOARD_CURRENT.pack(current), SCOREBOARD_CURRENT_AT)

    def write(self, data: bytes, offset: int) -> None:
        try:
            os.pwrite(self.descriptor, data, offset)
        except OSError:
            pass

    def close(self) -> None:
        os.close(self.descriptor)


def scoreboard_claim(statedir: str, pid: int, peer: Any, now: "float | None" = None) -> ScoreboardEntry:
    """The entry of session `pid`, of the Peer `peer`, on an open descriptor; for root, before chroot.

    Raises OSError or ConfigError; then no entry is left behind. What lies in the way belonged to a dead process.
    """
    directory = statedir_open(statedir)
    name = scoreboard_name(pid)
    flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC
    try:
        try:
            descriptor = os.open(name, flags, 0o600, dir_fd=directory)
        except FileExistsError:
            os.unlink(name, dir_fd=directory)
            descriptor = os.open(name, flags, 0o600, dir_fd=directory)
        try:
            os.ftruncate(descriptor, SCOREBOARD_LAYOUT.size)
        except OSError:
            os.close(descriptor)
            os.unlink(name, dir_fd=directory)
            raise
    finally:
        os.close(directory)
    now = time.time() if now is None else now
    entry = ScoreboardEntry(descriptor, pid, peer, now)
    entry.update(SCOREBOARD_IDLE, now=now)
    return entry


def scoreboard_remove(statedir: str, pid: int) -> None:
    """Remove the entry of `pid`, if there is one. PRIV calls it as root; the name is made of a number only."""
    try:
        os.unlink(f"{statedir}/{scoreboard_name(pid)}")
    except FileNotFoundError:
        pass


def process_lives(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        pass
    try:
        with open("/proc/%d/stat" % pid, "rb") as file:         # a zombie, which some containers never reap, is dead
            return not file.read().rpartition(b")")[2].lstrip().startswith(b"Z")
    except OSError:
        return True


def scoreboard_entries(directory: int) -> Any:
    """Yield (pid, descriptor) of each entry of a living process; remove those of dead ones.

    The descriptor is closed when the next one is asked for.
    """
    owner = os.fstat(directory).st_uid
    for name in os.listdir(directory):
        digits = name[len("client-"):]
        if not name.startswith("client-") or not digits.isdecimal() or not 0 < int(digits) < 1 << 31:
            continue
        try:
            if not process_lives(int(digits)):
                os.unlink(name, dir_fd=directory)
                continue
            descriptor = os.open(name, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC, dir_fd=directory)
        except OSError:                                     # a session that just ended, or something planted
            continue
        try:
            found = os.fstat(descriptor)
            if stat.S_ISREG(found.st_mode) and found.st_uid == owner:
                yield int(digits), descriptor
        finally:
            os.close(descriptor)


def scoreboard_record(pid: int, data: bytes) -> ScoreboardRecord:
    """The record in `data`, which is long enough; everything else about it may be wrong."""
    layout = SCOREBOARD_LAYOUT_DEBIAN if len(data) == SCOREBOARD_LAYOUT_DEBIAN.size else SCOREBOARD_LAYOUT
    state, _, peer, local, *numbers, account, filename = layout.unpack_from(data)
    since, started, restart, total, current = (max(0, n) for n in numbers)
    return ScoreboardRecord(pid, state, sockaddr_unpack(peer), sockaddr_unpack(local), since, started, restart, total,
                            current, account.partition(b"\0")[0], filename.partition(b"\0")[0])


def scoreboard_read(statedir: str) -> "list[ScoreboardRecord]":
    """The sessions of the server that uses `statedir`, oldest first. Raises ConfigError (statedir_open)."""
    directory = statedir_open(statedir, reading=True)
    try:
        found = [(pid, os.pread(descriptor, 2048, 0))
                 for pid, descriptor in scoreboard_entries(directory)]
    finally:
        os.close(directory)
    records = [scoreboard_record(pid, data) for pid, data in found if len(data) >= SCOREBOARD_LAYOUT.size]
    return sorted((r for r in records if r.state != SCOREBOARD_FREE), key=lambda r: (r.since, r.pid))


def scoreboard_count(statedir: str, account: bytes, but: int = 0) -> int:
    """How many sessions `account` has, not counting process `but`. Raises ConfigError (statedir_open).

    Compat: letters' case does not matter (ftpwho_read_count).
    """
    directory = statedir_open(statedir, reading=True)
    try:
        names = [os.pread(descriptor, SCOREBOARD_ACCOUNT_SIZE, SCOREBOARD_ACCOUNT_AT)
                 for pid, descriptor in scoreboard_entries(directory) if pid != but]
    finally:
        os.close(directory)
    wanted = account[:SCOREBOARD_ACCOUNT_SIZE - 1].lower()
    return sum(name.partition(b"\0")[0].lower() == wanted for name in names)


def scoreboard_admit(statedir: str, entry: ScoreboardEntry, account: bytes, limit: "int | None") -> bool:
    """Put `account` on the scoreboard unless it has `limit` sessions already (None or 0: any number).

    Counting and putting happen under one lock, so two logins at once cannot both be the last one allowed. Login
    children alone take it, for the time of a scan; neither sessions nor ftpwho ever do.
    """
    if not limit:
        entry.login(account)
        return True
    import fcntl
    directory = statedir_open(statedir)
    try:
        fcntl.flock(directory, fcntl.LOCK_EX)
        if scoreboard_count(statedir, account, but=entry.pid) >= limit:
            return False
        entry.login(account)
        return True
    finally:
        os.close(directory)                                 # ends the lock

# ==== Upload pipe =================================================================================
# Each stored file is announced to `uploadscript` as "\x02 account \x01 path \x00" on a FIFO in StateDir. The message
# is what keeps them apart, so control bytes are refused in it, and it is no longer than PIPE_BUF: such a write is never
# torn nor mixed with another one. A lock file is held around it all the same, as the original's daemon, whose messages
# can be longer, does: both may serve one reader. What lies under these two names is trusted only if it is of the right
# kind, ours, mode 0600, with one name, and still the same file under that name after it was opened.
#
# PRIV keeps the FIFO open for both ways (uploadpipe_create), so a session can open it for writing only (it cannot take
# messages from it) and messages wait in it while no reader runs. When it is full, an upload waits a few seconds at
# most. Compat: the original waits for ever, at its start for a reader, and for room in the pipe when it is full.

UPLOADPIPE_NAME = "pure-ftpd.upload.pipe"
UPLOADPIPE_LOCK = "pure-ftpd.upload.lock"
UPLOADPIPE_WAIT = 5.0               # seconds an upload waits for room
UPLOADPIPE_LONGEST = 4096           # bytes of a message; PIPE_BUF of Linux, larger than other systems' 512
UPLOADPIPE_ROOM = 1 << 20           # bytes the FIFO holds where that can be set


class UploadPipe:
    """What a session holds to announce its uploads."""

    def __init__(self, fifo: int, lock: int):
        self.fifo = fifo
        self.lock = lock
        self.lost = 0               # uploads not announced since the pipe became stuck

    def close(self) -> None:
        os.close(self.fifo)
        os.close(self.lock)


class UploadMessage(NamedTuple):
    account: bytes
    path: bytes                     # absolute


def has_control(data: bytes) -> bool:
    return any(c < 32 or c == 127 for c in data)


def uploadpipe_message(account: bytes, path: bytes) -> bytes:
    """The bytes that announce `path`. ValueError says why it cannot be announced."""
    if has_control(account + path):
        raise ValueError("its name holds control characters")
    message = b"\2%b\1%b\0" % (account[:127], path)
    if not path.startswith(b"/") or len(message) > UPLOADPIPE_LONGEST:
        raise ValueError("its path is too long" if path.startswith(b"/") else "its path is not absolute")
    return message


def uploadpipe_file(statedir: str, directory: int, name: str, flags: int, is_kind: "Callable[[int], bool]") -> int:
    """A descriptor of `name` in StateDir that passed every check. Raises ConfigError."""
    where = f"{statedir}/{name}"
    try:
        descriptor = os.open(name, flags | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC, 0o600, dir_fd=directory)
    except OSError as error:
        why = {errno.ELOOP: "a link", errno.ENXIO: "no server holds it open"}.get(error.errno or 0, error.strerror)
        raise ConfigError(f"{where}: cannot be used: {why}") from None
    try:
        found = os.fstat(descriptor)
        if not is_kind(found.st_mode):
            raise ConfigError(f"{where}: not a file of the right kind; remove it")
        if found.st_uid != os.geteuid():
            raise ConfigError(f"{where}: owned by uid {found.st_uid}, not by this user; remove it")
        if stat.S_IMODE(found.st_mode) != 0o600 or found.st_nlink != 1:
            raise ConfigError(f"{where}: mode {stat.S_IMODE(found.st_mode):04o}, {found.st_nlink} names, "
                              "not 0600 and one; remove it")
        named = os.stat(name, dir_fd=directory, follow_symlinks=False)
        if (named.st_dev, named.st_ino) != (found.st_dev, found.st_ino):
            raise ConfigError(f"{where}: replaced while it was being opened")
    except OSError as error:
        os.close(descriptor)
        raise ConfigError(f"{where}: {error.strerror}") from None
    except ConfigError:
        os.close(descriptor)
        raise
    return descriptor


def uploadpipe_create(statedir: str) -> int:
    """Make the FIFO and the lock file where they are missing; the descriptor that PRIV keeps, and its children close.

    Raises ConfigError when something else lies there.
    """
    import fcntl
    directory = statedir_open(statedir)
    try:
        os.close(uploadpipe_file(statedir, directory, UPLOADPIPE_LOCK, os.O_RDWR | os.O_CREAT, stat.S_ISREG))
        try:
            os.mkfifo(UPLOADPIPE_NAME, 0o600, dir_fd=directory)
        except FileExistsError:
            pass
        except OSError as error:
            raise ConfigError(f"{statedir}/{UPLOADPIPE_NAME}: cannot be made: {error.strerror}") from None
        fifo = uploadpipe_file(statedir, directory, UPLOADPIPE_NAME, os.O_RDWR, stat.S_ISFIFO)
    finally:
        os.close(directory)
    if sys.platform == "linux":
        try:
            fcntl.fcntl(fifo, F_SETPIPE_SZ, UPLOADPIPE_ROOM)
        except OSError:
            pass                                            # the usual 64 KiB, then
    return fifo


def uploadpipe_open(statedir: str) -> UploadPipe:
    """What the login child keeps for its session. Raises ConfigError, also when no PRIV holds the FIFO."""
    import fcntl  # noqa: F401
    directory = statedir_open(statedir)
    try:
        lock = uploadpipe_file(statedir, directory, UPLOADPIPE_LOCK, os.O_RDWR, stat.S_ISREG)
        try:
            return UploadPipe(uploadpipe_file(statedir, directory, UPLOADPIPE_NAME, os.O_WRONLY, stat.S_ISFIFO), lock)
        except ConfigError:
            os.close(lock)
            raise
    finally:
        os.close(directory)


def uploadpipe_try(pipe: UploadPipe, message: bytes) -> str:
    """Write `message` if that is possible at once; else the reason why not."""
    import fcntl
    try:
        fcntl.lockf(pipe.lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        return "its lock is held by another process"
    try:
        whole = os.write(pipe.fifo, message) == len(message)
        return "" if whole else "the upload pipe took a part only"
    except BlockingIOError:
        return "the upload pipe is full; is uploadscript running?"
    except OSError as error:
        return f"the upload pipe cannot be written: {error.strerror}"
    finally:
        fcntl.lockf(pipe.lock, fcntl.LOCK_UN)


def uploadpipe_write(pipe: UploadPipe, account: bytes, path: bytes, log: Any, wait: float = UPLOADPIPE_WAIT) -> bool:
    """Announce that `account` has stored `path` (absolute, outside any chroot). False: not announced, and logged.

    A pipe that stayed stuck for `wait` seconds is tried but not waited for again until it takes a message.
    """
    try:
        message = uploadpipe_message(account, path)
    except ValueError as error:
        log.warning(f"Upload script not called for {printable(path)}: {error}")
        return False
    deadline = time.monotonic() + (0 if pipe.lost else wait)
    while True:
        reason = uploadpipe_try(pipe, message)
        if not reason or time.monotonic() >= deadline:
            break
        time.sleep(0.01)
    if reason:
        if not pipe.lost:
            log.warning(f"Upload script not called for {printable(path)} and until further notice: {reason}")
        pipe.lost += 1
        return False
    if pipe.lost:
        log.warning(f"Upload script is called again; {pipe.lost} uploads were left out")
        pipe.lost = 0
    return True


def uploadpipe_reader(statedir: str) -> int:
    """A descriptor to read announcements from. Raises ConfigError.

    Opened for both ways: then there is no end of file when the daemon stops, and nothing to wait for before it starts.
    """
    directory = statedir_open(statedir)
    try:
        return uploadpipe_file(statedir, directory, UPLOADPIPE_NAME, os.O_RDWR, stat.S_ISFIFO)
    finally:
        os.close(directory)


def uploadpipe_parse(data: bytes) -> "UploadMessage | None":
    """The announcement in `data`, which was read up to a zero byte; None when there is none in it."""
    _, framed, message = data.rpartition(b"\2")
    account, _, path = message.partition(b"\1")
    if not framed or not path.startswith(b"/") or len(account) > 127 or has_control(account + path):
        return None
    return UploadMessage(account, path)


def uploadpipe_next(descriptor: int, buffer: bytearray, timeout: float) -> "UploadMessage | None":
    """The next announcement; None when nothing came for `timeout` seconds. `buffer` keeps its first part until then.

    Read byte by byte, as the original does: what follows stays in the pipe for whoever reads next. Anything that is
    no announcement is thrown away, however long it is.
    """
    while True:
        try:
            byte = os.read(descriptor, 1)
        except BlockingIOError:
            if not select.select([descriptor], [], [], timeout)[0]:
                return None
            continue
        if byte != b"\0":
            buffer += byte
            del buffer[:-2 * UPLOADPIPE_LONGEST]            # the original's daemon may send more than LONGEST
            continue
        message = uploadpipe_parse(bytes(buffer))
        buffer.clear()
        if message:
            return message

# ==== Commands ====================================================================================
# What is true of a verb stands above its handler; dispatch() enforces it and names no verb. A verb that does not say
# `login=False` is for those who are logged in. HELP and FEAT are loops over the table.
#
# Conversation is one client's side of the protocol without its sockets: the greeting's half of it (Visitor) lives in
# SERVER or in the client's TLS process, the other half (Session) in the process of the user. Both answer the commands
# below alike.

# (code, text); bytes that are a reply already; None: answered elsewhere
Reply = "tuple[int, str | bytes] | bytes | None"


class Command(NamedTuple):
    """One row of the table of commands."""
    method: str                                     # the name of its handler: method(argument) -> Reply
    login: bool = True                              # only for users who are logged in
    missing: "tuple[int, str] | None" = None        # the reply when the argument is missing; None: it may be
    data: bool = False                              # opens a data connection
    idle: bool = False                              # does not count as activity
    feat: "str | Callable[[Any], str | None]" = ""  # its line in FEAT
    help: bool = True                               # shown by HELP


COMMANDS: "dict[bytes, Command]" = {}
SITE_COMMANDS: "dict[bytes, Command]" = {}


def command(*verbs: str, table: "dict[bytes, Command]" = COMMANDS, **properties: Any) -> "Callable[[Any], Any]":
    """Register a method as the handler of `verbs`; Command lists the properties and their defaults."""
    def register(method: Any) -> Any:
        row = Command(method.__name__, **properties)
        for verb in verbs:
            table[verb.encode()] = row
            row = row._replace(feat="", help=False)         # FEAT and HELP name a handler once
        return method
    return register


def columns(words: "list[str]", width: int = 8, per_line: int = 8) -> str:
    """`words` in lines that begin with a space."""
    lines = [words[i:i + per_line] for i in range(0, len(words), per_line)]
    return "\n".join(" " + "".join(word.ljust(width) for word in line).rstrip() for line in lines)


class Conversation:
    """What a client and the server have said to each other so far, and the commands that need no login."""

    __slots__ = ("options", "log", "negotiated", "input", "encrypted", "host")
    logged_in = False

    def __init__(self, options: Any, log: Log, negotiated: Negotiated, pending: bytes, encrypted: bool, host: str) -> None:
        self.options, self.log = options, log
        self.negotiated = negotiated
        self.input = ControlInput(pending)
        self.encrypted = encrypted
        self.host = host                            # the client's address (or name), for the log

    def dispatch(self, line: bytes) -> Any:
        """The Reply to one command line. Raises Hangup when the conversation is over."""
        verb, argument = command_split(line)
        entry = COMMANDS.get(verb)
        if self.options.verboselog:
            self.log_command(verb, argument)
        try:
            if entry is None:
                if verb[:1] not in VERBS_BEGIN_WITH:
                    # Compat: as the original, which does not answer lines that begin otherwise
                    return None
                raise Refuse(*(UNKNOWN if self.logged_in else NOT_LOGGED_IN))
            if entry.login and not self.logged_in:
                raise Refuse(*NOT_LOGGED_IN)
            if not argument and entry.missing:
                raise Refuse(*entry.missing)
            if entry.data and self.options.tls == 3 and not self.negotiated.private:
                raise Refuse(521, "Data connections need PROT P here")
            return getattr(self, entry.method)(argument)
        except Refuse as refusal:
            return refusal.args
        except OSError as error:
            return os_error_reply(error)

    def log_command(self, verb: bytes, argument: bytes) -> None:
        secret = verb == b"PASS"
        if verb not in COMMANDS and not self.logged_in:     # a slip of the finger, and a password may stand behind it
            secret, verb = True, verb[:4]
        shown = "<*>" if secret else printable(argument)
        self.log.debug(f"Command [{printable(verb).lower()}] [{shown}]")

    # -- who one is, and how one goes ------------------------------------------------------------------

    @command("QUIT", login=False)
    def do_quit(self, argument: bytes) -> Any:
        raise Hangup(221, self.farewell())

    def facts(self) -> "tuple[bytes, ...]":
        """The facts that OPTS MLST has selected, all of them at first."""
        return tuple(fact for n, fact in enumerate(FACTS) if self.negotiated.facts >> n & 1)

    def farewell(self) -> str:
        return "Goodbye"

    @command("USER", login=False)
    def do_user(self, argument: bytes) -> Any:
        """RFC 959 section 4.1.1."""
        raise Refuse(530, "You are logged in already")

    @command("PASS", login=False)
    def do_pass(self, argument: bytes) -> Any:
        raise Refuse(530, "You are logged in already")

    @command("ACCT", login=False)
    def do_acct(self, argument: bytes) -> Any:
        return 202, "No account is needed"

    @command("CLNT", login=False, idle=True, help=False)
    def do_clnt(self, argument: bytes) -> Any:
        """A client tells its name. Many do so before the login, and take anything but 200 for trouble."""
        self.negotiated.client = argument[:CLIENT_MAX]
        return 200, "Noted"

    # -- what is spoken --------------------------------------------------------------------------------

    @command("NOOP", login=False, idle=True)
    def do_noop(self, argument: bytes) -> Any:
        return 200, "Nothing done"

    @command("SYST", login=False, idle=True)
    def do_syst(self, argument: bytes) -> Any:
        return 215, "UNIX Type: L8"

    @command("TYPE", login=False, idle=True, missing=(501, "Which type? A, I or L 8"))
    def do_type(self, argument: bytes) -> Any:
        """RFC 959 section 3.1.1. Compat: only the first letter counts (dotype)."""
        kind = argument[:1].upper()
        if kind == b"A":
            self.negotiated.binary = False
            return 200, "TYPE is now ASCII"
        if kind == b"I" or kind == b"L" and argument[1:].strip() in (b"", b"8"):
            self.negotiated.binary = True
            return 200, "TYPE is now 8-bit binary"
        if kind == b"L":
            raise Refuse(504, "Only bytes of 8 bits")
        raise Refuse(504, "Unknown type: A, I and L 8 are known")

    @command("MODE", login=False, idle=True, missing=(501, "Which mode? S"))
    def do_mode(self, argument: bytes) -> Any:
        if argument.upper() != b"S":
            raise Refuse(504, "Only mode S (stream) is known")
        return 200, "S it is"

    @command("STRU", login=False, idle=True, missing=(501, "Which structure? F"))
    def do_stru(self, argument: bytes) -> Any:
        if argument.upper() != b"F":
            raise Refuse(504, "Only structure F (file) is known")
        return 200, "F it is"

    @command("OPTS", login=False, idle=True, missing=(501, "Options of what?"))
    def do_opts(self, argument: bytes) -> Any:
        """RFC 2389 section 4; OPTS MLST: RFC 3659 section 7.9. Compat: UTF8 ON is 504 in the original."""
        what, _, value = argument.partition(b" ")
        if what.upper() == b"UTF8" and value.strip().upper() in (b"", b"ON"):
            return 200, "UTF-8 is always on"
        if what.upper() == b"MLST":
            facts = facts_select(value)
            self.negotiated.facts = sum(1 << FACTS.index(fact) for fact in facts)
            return 200, b"MLST OPTS " + b"".join(fact + b";" for fact in facts)
        raise Refuse(504, "Unknown option: MLST and UTF8 ON are known")

    @command("FEAT", login=False)
    def do_feat(self, argument: bytes) -> Any:
        """RFC 2389 section 3: only what works here."""
        lines = []
        for row in COMMANDS.values():
            feat = row.feat if isinstance(row.feat, str) else row.feat(self)
            lines += [" " + line for line in feat.split("\n")] if feat else []
        return 211, "\n".join(["Extensions supported:", *lines, " UTF8", " TVFS", "End."])

    @command("HELP", login=False)
    def do_help(self, argument: bytes) -> Any:
        verbs = [verb.decode() for verb, row in COMMANDS.items()
                 if row.help and (isinstance(row.feat, str) or row.feat(self) is not None)]
        site = [verb.decode() for verb, row in SITE_COMMANDS.items() if row.help]
        return 214, "\n".join(["These commands are known:", columns(verbs), "and after SITE:", columns(site),
                               "pureftpd.py"])

    # -- TLS -------------------------------------------------------------------------------------------

    @command("AUTH", login=False, idle=True, feat=lambda self: "AUTH TLS" if self.options.tls else None)
    def do_auth(self, argument: bytes) -> Any:
        """RFC 4217 section 4."""
        if not self.options.tls:
            raise Refuse(502, "TLS is not offered here")
        mechanism = argument.upper()
        if mechanism not in AUTH_MECHANISMS and not (mechanism == b"SSL" and self.options.tlsauthssl):
            raise Refuse(504, "Only AUTH TLS is known")
        return self.start_tls()

    def start_tls(self) -> Any:
        """The reply to AUTH TLS when it may not be said (any more)."""
        if self.encrypted:
            return 234, "TLS is on already"
        raise Refuse(503, "Too late for TLS: it starts before the login")

    @command("PBSZ", login=False, idle=True, feat=lambda self: "PBSZ" if self.options.tls else None)
    def do_pbsz(self, argument: bytes) -> Any:
        if not self.encrypted:
            raise Refuse(503, "Only after AUTH TLS")
        self.negotiated.sized_buffer = True
        return 200, "PBSZ=0"

    @command("PROT", login=False, idle=True, missing=(503, "Which protection? C or P"),
             feat=lambda self: "PROT" if self.options.tls else None)
    def do_prot(self, argument: bytes) -> Any:
        """RFC 4217 section 9.

        Compat: S and E count as P, anything unknown is 534 and falls back to clear (ftp_parser.c).
        """
        if not self.encrypted:
            raise Refuse(503, "Only after AUTH TLS")
        self.negotiated.private = argument in (b"P", b"S", b"E")
        if not self.negotiated.private and argument != b"C":
            raise Refuse(534, "C (clear) and P (private) are known; this is C now")
        return 200, "Data protection is now " + ("private" if self.negotiated.private else "clear")

    @command("CCC", login=False, idle=True, feat=lambda self: "CCC" if self.options.tls else None)
    def do_ccc(self, argument: bytes) -> Any:
        """RFC 4217 section 12.3: only who has logged in may go back to a control connection in the clear."""
        if not self.encrypted or not self.logged_in:
            raise Refuse(534, "CCC needs TLS and a login")
        return self.clear_command_channel()

    def clear_command_channel(self) -> Any:
        raise Refuse(534, "CCC needs TLS and a login")

    # -- what is no FTP --------------------------------------------------------------------------------

    @command("CONNECT", "DELETE", "GET", "HEAD", "OPTIONS", "POST", "PUT", login=False, help=False)
    def do_http(self, argument: bytes) -> Any:
        """Somebody makes a browser talk to us: the lines behind this one may be of its choice."""
        raise Hangup(500, "This is an FTP server, not a web server")


AUTH_MECHANISMS = (b"TLS", b"TLS-C")
VERBS_BEGIN_WITH = frozenset(bytes([b]) for b in VERB_BYTES)
UNKNOWN = (500, "Unknown command")
NOT_LOGGED_IN = (530, "You are not logged in")

OS_ERROR_REPLIES = {                # errno: the code it gets instead of 550, RFC 959 section 4.2.2
    errno.ENOSPC: 452,
    errno.EDQUOT: 552,
    errno.EFBIG: 552,
    errno.EMFILE: 451,
    errno.ENFILE: 451,
    errno.ENOMEM: 451,
    errno.EIO: 451,
}


def os_error_reply(error: OSError) -> "tuple[int, str]":
    """The reply for a system call that failed."""
    return OS_ERROR_REPLIES.get(error.errno or 0, 550), error.strerror or "It failed"

# ==== Data connections ============================================================================
# RFC 959 section 3.2, RFC 2428. A session has at most one of: a passive socket that waits for the client, the address
# that a PORT named, an opened connection (ESTA, ESTP). Passive sockets survive a transfer, as the original's: some
# clients reuse them. Whoever connects from elsewhere than the control connection's client is turned away, and the
# waiting goes on.
#
# Attention is how a session waits: always for its own matter and for the control connection (ABOR, STAT), PRIV (end
# of the server) and the clock. Nothing else in a session blocks on a client.

POLL_MAX = (1 << 31) - 1            # milliseconds that poll(2) takes: 24 days, -I may be longer
CONNECT_SECONDS = 30                # for an active data connection, as 1.0.54
STOP_SECONDS = 10                   # grace for running transfers when the server stops
# for a passive one. Compat: the original waits for the idle time and then ends the session
ACCEPT_SECONDS = 60
SEND_SECONDS = 60                   # a client that takes no reply for so long is gone
CONTROL_READ = 16384                # bytes asked from the control connection at a time


class Aborted(Exception):
    """ABOR arrived while something was under way."""


class TimedOut(Exception):
    """Nothing happened for too long."""


def poll_milliseconds(seconds: float) -> int:
    """For poll(2), which must not end before the time does."""
    return max(0, min(int(seconds * 1000 + 0.999), POLL_MAX))


class Attention:
    """Waits for one thing while it watches the control connection and PRIV."""

    def __init__(self, control: socket.socket, channel: "socket.socket | None", lines: ControlInput) -> None:
        self.control, self.channel, self.lines = control, channel, lines
        self.poller = select.poll()
        self.poller.register(control, select.POLLIN)
        self.listening = True                           # whether the control connection is being read
        self.channel_fd = -1
        if channel is not None:
            self.channel_fd = channel.fileno()
            self.poller.register(self.channel_fd, select.POLLIN)
        # the server ends: what is under way may go on till then (monotonic)
        self.stop_at: "float | None" = None
        self.on_status: "Callable[[], None] | None" = None      # answers a STAT during a transfer

    def poll(self, seconds: float) -> "list[tuple[int, int]]":
        """What happened within `seconds`, after the control connection and PRIV have been looked after."""
        events = self.poller.poll(poll_milliseconds(seconds))
        return [event for event in events if not self.looked_after(event[0])]

    def looked_after(self, fd: int) -> bool:
        if fd == self.control.fileno():
            self.read_control()
        elif fd == self.channel_fd:
            self.read_channel()
        else:
            return False
        return True

    def listen(self, listening: bool) -> None:
        """Read the control connection, or leave what comes in the kernel's buffer."""
        if listening != self.listening:
            self.listening = listening
            self.poller.modify(self.control, select.POLLIN if listening else 0)

    def read_control(self) -> None:
        try:
            data = self.control.recv(CONTROL_READ)
        except OSError:
            data = b""
        if not data:
            raise Hangup()
        self.lines.feed(data)

    def read_channel(self) -> None:
        """PRIV says STOP, or is gone: nothing new is begun."""
        self.poller.unregister(self.channel_fd)
        self.channel_fd = -1
        self.stop_at = time.monotonic() + STOP_SECONDS

    def ask(self, question: bytes) -> "tuple[int, list[int]]":
        """PRIV's answer to a message: (its kind, descriptors). Raises OSError, MessageError."""
        assert self.channel is not None
        self.channel.send(question)
        while True:
            message, fds = message_receive(self.channel, 1)
            if not message:
                raise OSError(errno.EPIPE, "PRIV is gone")
            kind, _ = plain_parse(message)
            if kind != STOP:
                return kind, fds
            self.stop_at = time.monotonic() + STOP_SECONDS

    def next_line(self, seconds: float) -> bytes:
        """The next command. Raises TimedOut, or Hangup when the client or the server goes."""
        line = self.lines.line()
        if line is not None:
            return line
        deadline = time.monotonic() + seconds               # for the whole line, however slowly it comes
        while line is None:
            if self.stop_at is not None:
                raise Hangup(421, "The server is shutting down, goodbye")
            self.listen(True)
            left = deadline - time.monotonic()
            events = self.poller.poll(poll_milliseconds(left))
            if not events and left * 1000 < POLL_MAX:
                raise TimedOut()
            for fd, _ in events:
                self.looked_after(fd)
            line = self.lines.line()
        return line

    def wait(self, fd: int, mask: int, seconds: float) -> None:
        """Return when `fd` is ready. Raises TimedOut after `seconds`, Aborted when the client says ABOR."""
        self.poller.register(fd, mask)
        try:
            deadline = time.monotonic() + seconds
            while not self.poll_with_commands(deadline - time.monotonic()):
                if time.monotonic() >= deadline:
                    raise TimedOut()
        finally:
            self.poller.unregister(fd)

    def pause(self, seconds: float) -> None:
        """Let `seconds` pass, awake for ABOR."""
        deadline = time.monotonic() + seconds
        while seconds > 0:
            self.poll_with_commands(seconds)
            seconds = deadline - time.monotonic()

    def poll_with_commands(self, seconds: float) -> "list[tuple[int, int]]":
        """poll(), then do what a transfer does about commands: ABOR and STAT at once, the others wait for their turn.
        """
        self.check_abort()
        self.listen(not self.lines.full())
        if self.stop_at is not None:
            seconds = min(seconds, self.stop_at - time.monotonic())
        events = self.poll(seconds)
        self.check_abort()
        if self.stop_at is not None and time.monotonic() >= self.stop_at:
            raise Hangup(421, "The server is shutting down, goodbye")
        return events

    def check_abort(self) -> None:
        """Raises Aborted when ABOR waits among the lines; answers STAT when it is the next one."""
        if self.lines.pending():
            if self.lines.holds(b"ABOR"):
                raise Aborted()
            while self.on_status and self.lines.next_is(b"STAT"):
                self.lines.line()
                self.on_status()


def address_normal(address: str) -> str:
    """An address for comparison: an IPv4-mapped one as IPv4, without scope."""
    address = address.partition("%")[0]
    return address[7:] if address.lower().startswith("::ffff:") and "." in address else address


class DataPort:
    """Where the next data connection comes from or goes to."""

    def __init__(self, attention: Attention, peer: Peer, family: int, range_: "tuple[int, int]", foreign: bool,
                 receive_buffer: int = 0) -> None:
        self.attention, self.peer, self.family, self.range = attention, peer, family, range_
        self.receive_buffer = receive_buffer                    # SO_RCVBUF of a throttled session, 0: the kernel's own
        # FXP: other addresses than the client's are welcome (-w, -W)
        self.foreign = foreign
        self.listener: "socket.socket | None" = None
        self.target: "tuple[str, int] | None" = None            # PORT, EPRT
        self.opened: "socket.socket | None" = None              # ESTA, ESTP

    def close(self) -> None:
        for sock in (self.listener, self.opened):
            if sock is not None:
                sock.close()
        self.listener = self.target = self.opened = None

    def listen(self) -> int:
        """Wait on a port from now on; its number. Raises Refuse(425) when none is free."""
        self.close()
        for port in self.ports():
            sock = socket.socket(self.family, socket.SOCK_STREAM)
            try:
                sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
                sock.bind(address_to_bind(self.peer.local_address, port))
                self.prepare(sock)
                sock.listen(8)
            except OSError as error:
                sock.close()
                if error.errno not in (errno.EADDRINUSE, errno.EACCES):
                    raise
                continue
            sock.setblocking(False)
            self.listener = sock
            return port
        raise Refuse(425, "All passive ports are in use, try again later")

    def prepare(self, sock: socket.socket) -> None:
        """What must be set before a connection is made."""
        if self.receive_buffer:
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, self.receive_buffer)

    def ports(self) -> "Any":
        """The ports to try: the whole range from a random place downwards, once each."""
        first, last = self.range
        count = last - first + 1
        start = int.from_bytes(os.urandom(4), "big") % count
        for step in range(count):
            yield first + (start - step) % count

    def aim(self, address: str, port: int) -> None:
        """The next transfer connects there."""
        self.close()
        self.target = address, port

    def connect(self, bind: "Callable[[int], socket.socket]") -> socket.socket:
        """The data connection, non-blocking; `bind(family)` makes the socket of an active one.

        Raises Refuse(425) when there is no way to it, Aborted, Hangup.
        """
        if self.opened is not None:
            sock, self.opened = self.opened, None
            return sock
        try:
            if self.listener is not None:
                return self.accept(self.listener)
            if self.target is not None:
                target, self.target = self.target, None
                return self.connect_to(target, bind)
        except TimedOut:
            raise Refuse(425, "No data connection was made in time") from None
        raise Refuse(425, "No data connection: say PASV, EPSV, PORT or EPRT first")

    def accept(self, listener: socket.socket) -> socket.socket:
        deadline = time.monotonic() + ACCEPT_SECONDS
        while True:
            try:
                sock, address = listener.accept()
            except BlockingIOError:
                self.attention.wait(listener.fileno(), select.POLLIN, deadline - time.monotonic())
                continue
            except OSError as error:
                raise Refuse(425, "No data connection: " + (error.strerror or "error")) from None
            if self.foreign or address_normal(address[0]) == self.peer.address:
                sock.setblocking(False)
                return sock
            sock.close()
            if time.monotonic() > deadline:
                raise TimedOut()

    def connect_to(self, target: "tuple[str, int]", bind: "Callable[[int], socket.socket]") -> socket.socket:
        family = socket.AF_INET6 if ":" in target[0] else socket.AF_INET
        sock = bind(family)
        try:
            sock.setblocking(False)
            self.prepare(sock)
            if sock.connect_ex(target) not in (0, errno.EINPROGRESS):
                raise Refuse(425, "Could not connect to port %d" % target[1])
            self.attention.wait(sock.fileno(), select.POLLOUT, CONNECT_SECONDS)
            problem = sock.getsockopt(socket.SOL_SOCKET, socket.SO_ERROR)
            if problem:
                raise Refuse(425, "Could not connect to port %d: %s" % (target[1], os.strerror(problem)))
        except BaseException:
            sock.close()
            raise
        return sock


def port_argument(text: bytes) -> "tuple[str, int]":
    """(address, port) of PORT's six numbers (RFC 959 section 5.3.2). Raises Refuse(501)."""
    numbers = [whole_number(part.strip(), 255) for part in text.split(b",")]
    if len(numbers) != 6 or None in numbers:
        raise Refuse(501, "PORT takes six numbers: h1,h2,h3,h4,p1,p2")
    values = [n or 0 for n in numbers]
    return "%d.%d.%d.%d" % tuple(values[:4]), values[4] * 256 + values[5]


def eprt_argument(text: bytes) -> "tuple[str, int]":
    """(address, port) of EPRT's |family|address|port| (RFC 2428 section 2). Raises Refuse(501, 522)."""
    parts = text.split(text[:1]) if text else []
    if len(parts) != 5 or parts[4] or text[:1].isalnum():
        raise Refuse(501, "EPRT takes |1|address|port| or |2|address|port|")
    _, kind, host, port, _ = parts
    number = whole_number(port, 65535)
    if kind not in (b"1", b"2"):
        raise Refuse(522, "Unknown network protocol, use (1,2)")
    if number is None:
        raise Refuse(501, "The port must be a number up to 65535")
    family = socket.AF_INET if kind == b"1" else socket.AF_INET6
    try:
        address = host.decode("ascii").partition("%")[0]
        if kind == b"1":
            address = address.replace(",", ".")         # Compat: some clients write the address as for PORT (do_eprt)
        return socket.inet_ntop(family, socket.inet_pton(family, address)), number
    except (ValueError, OSError):
        raise Refuse(501, "That is no IPv%s address" % ("4" if kind == b"1" else "6")) from None

# ==== Streams: the bytes of a data connection =====================================================
# A Stream moves bytes between one data connection and one file, at a pace, while Attention watches for ABOR. Binary
# downloads are sendfile(2); binary uploads start with a buffer and, once they prove to be large, go on with splice(2)
# through a pipe of 1 MiB (measured: 1.2 to 1.5 times cheaper than the original; with the kernel's 64 KiB pipe, or
# recv and write, twice as dear). ASCII is converted by the block with bytes.replace (RFC 959 section 3.1.1.1).
#
# `moved` counts what went over the wire on the way down, what was stored on the way up: the figures of logs and
# ratios.

SEND_AT_ONCE = 8 << 20              # bytes asked of one sendfile(2)
BLOCK_SIZE = 1 << 18                # bytes of a converted or copied block
FIRST_BLOCK = 1 << 14               # bytes of the buffer with which an upload begins
SPLICE_AFTER = 1 << 18              # bytes received before a pipe is worth its making
PIPE_SIZE = 1 << 20                 # bytes
PROGRESS_SECONDS = 1.0              # between two notes on the scoreboard


class DataLost(Exception):
    """The data connection broke: the text says how."""


class Full(Exception):
    """The quota is used up: what was granted has been written."""


SHORTER = (451, "The file became shorter while it was sent")


class Stream:
    """A data connection in the clear. Methods raise DataLost, TimedOut, Aborted, Hangup; OSError and Refuse are the file's."""

    spliced = splice is not None                # whether uploads may go through a pipe

    def __init__(self, sock: socket.socket, attention: Attention, rate: int, idle: float,
                 progress: "Callable[[int], None] | None") -> None:
        self.sock, self.attention, self.idle, self.progress = sock, attention, idle, progress
        self.moved = 0                                  # bytes
        self.started = self.noted = time.monotonic()
        self.throttle = Throttle(rate, self.started)

    # -- one system call each: what TLS does differently ---------------------------------------------

    def send_some(self, data: "bytes | memoryview") -> int:
        """How many bytes of `data` were taken; BlockingIOError when none."""
        return self.sock.send(data)

    def receive_into(self, buffer: memoryview) -> int:
        """How many bytes came, 0 at the end; BlockingIOError when none."""
        return self.sock.recv_into(buffer)

    def wait_writable(self) -> None:
        self.attention.wait(self.sock.fileno(), select.POLLOUT, self.idle)

    def wait_readable(self) -> None:
        self.attention.wait(self.sock.fileno(), select.POLLIN, self.idle)

    def finish_sending(self) -> None:
        """Tell the client that all was sent, when that has taken as long as it should."""
        self.attention.pause(self.throttle.wait(time.monotonic()))
        try:
            self.sock.shutdown(socket.SHUT_WR)
        except OSError as error:
            raise DataLost(error.strerror or "closed by the client") from None

    def close(self) -> None:
        self.sock.close()

    # -- pace ----------------------------------------------------------------------------------------

    def allowance(self) -> int:
        """How many bytes may go now; waits till that is more than 0."""
        while True:
            now = time.monotonic()
            if now - self.noted >= PROGRESS_SECONDS:
                self.noted = now
                self.attention.poll_with_commands(0)        # a transfer that never waits must see ABOR, too
                if self.progress:
                    self.progress(self.moved)
            allowed = self.throttle.allowance(now)
            if allowed:
                return allowed
            self.attention.pause(self.throttle.wait(now))

    def account(self, count: int) -> None:
        self.moved += count
        self.throttle.spend(count)

    def seconds(self) -> float:
        return time.monotonic() - self.started

    # -- down ----------------------------------------------------------------------------------------

    def send(self, data: "bytes | memoryview") -> None:
        """Send all of `data`."""
        rest = memoryview(data)
        while rest:
            allowed = self.allowance()
            try:
                count = self.send_some(rest[:allowed] if allowed < len(rest) else rest)
            except BlockingIOError:
                self.wait_writable()
                continue
            except (ConnectionError, TimeoutError) as error:
                raise DataLost(error.strerror or "closed by the client") from None
            self.account(count)
            rest = rest[count:]

    def send_file(self, fd: int, offset: int, end: int) -> None:
        """Send the bytes of `fd` from `offset` to `end`. Raises Refuse where the file has become shorter."""
        target = self.sock.fileno()
        while offset < end:
            most = min(self.allowance(), end - offset, SEND_AT_ONCE)
            try:
                count = os.sendfile(target, fd, offset, most)
            except BlockingIOError:
                self.wait_writable()
                continue
            except (ConnectionError, TimeoutError) as error:
                raise DataLost(error.strerror or "closed by the client") from None
            if not count:
                raise Refuse(*SHORTER)
            offset += count
            self.account(count)
            self.attention.check_abort()

    def send_text(self, fd: int, offset: int, end: int) -> None:
        """Send `fd` from `offset` on with CR LF at the end of each line. Raises Refuse where it ends before `end`.

        Compat: CR LF stays; the original makes CR CR LF.
        """
        os.lseek(fd, offset, os.SEEK_SET)
        carried = b""                                   # a CR at the end of a block: what follows decides
        while True:
            block = os.read(fd, BLOCK_SIZE)
            offset += len(block)
            data = carried + block
            carried = b"\r" if block and data[-1:] == b"\r" else b""
            if carried:
                data = data[:-1]
            if b"\r" in data:
                data = data.replace(b"\r\n", b"\n")
            self.send(data.replace(b"\n", b"\r\n"))
            if not block:
                if offset < end:
                    raise Refuse(*SHORTER)
                return

    # -- up ------------------------------------------------------------------------------------------

    def receive(self, buffer: memoryview) -> int:
        """How many bytes came into `buffer`, 0 at the end."""
        while True:
            allowed = self.allowance()
            try:
                count = self.receive_into(buffer[:allowed] if allowed < len(buffer) else buffer)
            except BlockingIOError:
                self.wait_readable()
                continue
            except (ConnectionError, TimeoutError) as error:
                raise DataLost(error.strerror or "closed by the client") from None
            self.throttle.spend(count)
            return count

    def receive_file(self, fd: int, room: "Callable[[int], int]") -> None:
        """Write what comes to `fd`. `room(n)` says how many of n bytes may be written; less raises Full."""
        buffer = memoryview(bytearray(FIRST_BLOCK))          # most uploads are small
        while not self.spliced or self.moved < SPLICE_AFTER:
            count = self.receive(buffer)
            if not count:
                return
            self.store(fd, buffer[:count], room)
            if count == FIRST_BLOCK:
                buffer = memoryview(bytearray(BLOCK_SIZE))
        del buffer
        self.splice_file(fd, room)

    def receive_text(self, fd: int, room: "Callable[[int], int]") -> None:
        """The same, without the CRs. Compat: all of them go, not only those before LF (dostor)."""
        buffer = memoryview(bytearray(BLOCK_SIZE))
        while True:
            count = self.receive(buffer)
            if not count:
                return
            self.store(fd, memoryview(bytes(buffer[:count]).replace(b"\r", b"")), room)

    def store(self, fd: int, data: memoryview, room: "Callable[[int], int]") -> None:
        granted = room(len(data))
        full = granted < len(data)
        data = data[:granted]
        while data:
            count = os.write(fd, data)
            self.moved += count
            data = data[count:]
        if full:
            raise Full()

    def splice_file(self, fd: int, room: "Callable[[int], int]") -> None:
        """receive_file() through a pipe, without copying."""
        import fcntl
        assert splice is not None
        outlet, inlet = os.pipe2(os.O_CLOEXEC | os.O_NONBLOCK)
        try:
            try:
                fcntl.fcntl(inlet, F_SETPIPE_SZ, PIPE_SIZE)
            except OSError:
                pass                                    # over the user's limit for pipes: the usual size works, slower
            while True:
                count = self.splice_in(inlet)
                if not count:
                    return
                granted = room(count)
                self.splice_out(outlet, fd, granted)
                if granted < count:
                    raise Full()
                self.attention.check_abort()
        finally:
            os.close(outlet)
            os.close(inlet)

    def splice_in(self, inlet: int) -> int:
        """How many bytes came into the empty pipe, 0 at the end."""
        assert splice is not None
        while True:
            most = min(self.allowance(), PIPE_SIZE)
            try:
                count = splice(self.sock.fileno(), inlet, most, flags=SPLICE_NONBLOCK | SPLICE_MOVE)
            except BlockingIOError:
                self.wait_readable()
                continue
            except (ConnectionError, TimeoutError) as error:
                raise DataLost(error.strerror or "closed by the client") from None
            self.throttle.spend(count)
            return count

    def splice_out(self, outlet: int, fd: int, count: int) -> None:
        assert splice is not None
        while count:
            written = splice(outlet, fd, count, flags=SPLICE_MOVE)
            self.moved += written
            count -= written

# ==== OpenSSL beyond the ssl module ===============================================================
# Four things that Python does not wrap, called through ctypes in the OpenSSL that its ssl module has loaded: the keys of
# session tickets, one more ticket for a client that is connected, a session that goes over into another process, and
# records that gather in memory, so that a large file goes out in few and large pieces.
# CPython keeps OpenSSL's pointers behind the heads of its objects. Whether they are where we look is tried in a child,
# which would be the one to crash; where it fails there is no LibSSL, and everybody does without.

TICKET_KEYS = 80                    # bytes: their name, a key for HMAC, one for AES
SESSION_MAX = 16384                 # bytes of an exported session, which may have a client's certificate in it
HANDOVER = struct.Struct("!H")      # its length, 0 for none: how the relay to a session under TLS begins
SSL_CTRL_GET_TLSEXT_TICKET_KEYS, SSL_CTRL_SET_TLSEXT_TICKET_KEYS = 58, 59


class LibSSL:
    """Functions of libssl. `context` is an SSLContext, `sock` an SSLSocket or SSLObject."""

    def __init__(self) -> None:
        """Raises ImportError, OSError, AttributeError where ctypes or a function is missing."""
        import _ssl
        import ctypes
        self.ctypes = ctypes
        self.library = ctypes.CDLL(getattr(_ssl, "__file__", None))
        pointer, number = ctypes.c_void_p, ctypes.c_int
        for name, result, *arguments in (
                ("SSL_CTX_ctrl", ctypes.c_long, pointer, number, ctypes.c_long, ctypes.c_char_p),
                ("SSL_get_SSL_CTX", pointer, pointer),
                ("SSL_get_session", pointer, pointer),
                ("i2d_SSL_SESSION", number, pointer, pointer),
                ("d2i_SSL_SESSION", pointer, pointer, pointer, ctypes.c_long),
                ("SSL_CTX_add_session", number, pointer, pointer),
                ("SSL_SESSION_free", None, pointer),
                ("SSL_get_wbio", pointer, pointer),
                ("SSL_set0_wbio", None, pointer, pointer),
                ("BIO_new_bio_pair", number, pointer, ctypes.c_size_t, pointer, ctypes.c_size_t),
                ("BIO_nread0", number, pointer, pointer),
                ("BIO_nread", number, pointer, pointer, number),
                ("BIO_up_ref", number, pointer),
                ("BIO_free", number, pointer)):
            function = getattr(self.library, name)
            function.restype, function.argtypes = result, arguments
        # since OpenSSL 3.0
        self.new_ticket: Any = getattr(self.library, "SSL_new_session_ticket", None)

    def of_context(self, context: Any) -> Any:
        """The SSL_CTX *."""
        return self.ctypes.c_void_p.from_address(id(context) + object.__basicsize__)

    def of_connection(self, sock: Any) -> Any:
        """The SSL *."""
        return self.ctypes.c_void_p.from_address(id(sock._sslobj) + object.__basicsize__ + struct.calcsize("P"))

    def ticket_keys_set(self, context: Any, keys: bytes) -> None:
        """SSL_CTX_set_tlsext_ticket_keys(3). Raises OSError."""
        if self.library.SSL_CTX_ctrl(self.of_context(context), SSL_CTRL_SET_TLSEXT_TICKET_KEYS, len(keys), keys) != 1:
            raise OSError(errno.EINVAL, "OpenSSL does not take ticket keys")

    def ticket_keys(self, context: Any) -> bytes:
        area = self.ctypes.create_string_buffer(TICKET_KEYS)
        self.library.SSL_CTX_ctrl(self.of_context(context), SSL_CTRL_GET_TLSEXT_TICKET_KEYS, TICKET_KEYS, area)
        return area.raw

    def ticket_promise(self, sock: Any) -> None:
        """Send the client one more ticket (TLS 1.3), before whatever is sent next: SSL_new_session_ticket(3)."""
        if self.new_ticket is not None:
            self.new_ticket(self.of_connection(sock))

    def session_export(self, sock: Any) -> bytes:
        """The session of a connection (i2d_SSL_SESSION(3)); b"" for one of no use elsewhere."""
        session = self.library.SSL_get_session(self.of_connection(sock))
        length = self.library.i2d_SSL_SESSION(session, None) if session else 0
        if not 0 < length <= SESSION_MAX:
            return b""
        area = self.ctypes.create_string_buffer(length)
        self.library.i2d_SSL_SESSION(session, self.cursor(area))
        return area.raw

    def session_import(self, context: Any, data: bytes) -> bool:
        """Let the client resume that session, by its id, on connections of `context`; False for nonsense."""
        area = self.ctypes.create_string_buffer(data, len(data))
        session = self.library.d2i_SSL_SESSION(None, self.cursor(area), len(data))
        if not session:
            self.library.ERR_clear_error()
            return False
        added = self.library.SSL_CTX_add_session(self.of_context(context), session)
        self.library.SSL_SESSION_free(session)
        return added == 1

    def cursor(self, area: Any) -> Any:
        """A pointer into an area, which OpenSSL moves on."""
        return self.ctypes.byref(self.ctypes.c_void_p(self.ctypes.addressof(area)))


class Outbox:
    """What OpenSSL writes to one connection, until close(): it gathers in memory, and its user sends it (BIO_s_bio(3)).

    OpenSSL alone writes each record of 16 KiB by itself. Measured: a download in large pieces costs a fifth less CPU in all.
    What has not been sent at close() is lost.
    """

    def __init__(self, libssl: LibSSL, sock: Any, size: int) -> None:
        """With room for `size` bytes: when it is full, writing to `sock` raises SSLWantWriteError. Raises MemoryError."""
        self.ctypes, self.library = libssl.ctypes, libssl.library
        self.connection = libssl.of_connection(sock).value
        inlet, self.outlet, self.start = (self.ctypes.c_void_p() for _ in range(3))
        if self.library.BIO_new_bio_pair(self.ctypes.byref(inlet), size, self.ctypes.byref(self.outlet), 1) != 1:
            raise MemoryError()
        self.direct = self.library.SSL_get_wbio(self.connection)
        self.library.BIO_up_ref(self.direct)            # because what is replaced is let go
        self.library.SSL_set0_wbio(self.connection, inlet)

    def waiting(self) -> memoryview:
        """What is to be sent next, without copying it; good until taken(), empty when all was."""
        count = self.library.BIO_nread0(self.outlet, self.ctypes.byref(self.start))
        if count <= 0:
            return memoryview(b"")
        return memoryview((self.ctypes.c_char * count).from_address(self.start.value)).cast("B")

    def taken(self, count: int) -> None:
        """So many bytes of waiting() were sent."""
        self.library.BIO_nread(self.outlet, self.ctypes.byref(self.start), count)

    def close(self) -> None:
        """From now on OpenSSL writes to the socket again."""
        self.library.SSL_set0_wbio(self.connection, self.direct)
        self.library.BIO_free(self.outlet)


class ClientTls(NamedTuple):
    """What one client's processes need for TLS."""
    context: Any                        # the SSLContext of its certificate
    ticket_keys: bytes                  # its own; b"" when the context is, too
    libssl: "LibSSL | None"

    def put_keys(self) -> None:
        """In a child: the ticket keys go into its copy of the context. Raises OSError."""
        if self.libssl is not None:
            self.libssl.ticket_keys_set(self.context, self.ticket_keys)
            wipe(self.ticket_keys)


def libssl_load() -> "LibSSL | None":
    """LibSSL, if it works here."""
    try:
        found = LibSSL()
    except (ImportError, OSError, AttributeError):
        return None
    pid = os.fork()
    if not pid:
        try:
            os._exit(0 if sys.implementation.name == "cpython" and libssl_works(found) else 1)
        finally:
            os._exit(1)
    return found if os.waitpid(pid, 0)[1] == 0 else None


def libssl_works(libssl: LibSSL) -> bool:
    """Whether keys are read back that were set, a connection leads to its context, and what it says can be gathered. May
    crash.
    """
    import ssl
    context, keys = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER), os.urandom(TICKET_KEYS)
    libssl.ticket_keys_set(context, keys)
    received = ssl.MemoryBIO()
    connection = context.wrap_bio(received, ssl.MemoryBIO(), server_side=True)
    found = libssl.library.SSL_get_SSL_CTX(libssl.of_connection(connection))
    outbox = Outbox(libssl, connection, 100)
    received.write(b"\x16\3\1\0\4" b"\1\0\0\0")            # a ClientHello of no bytes, which is answered by an alert
    try:
        connection.do_handshake()
    except ssl.SSLError:
        pass
    alert = outbox.waiting()[:1] == b"\x15"
    outbox.close()
    return libssl.ticket_keys(context) == keys and found == libssl.of_context(context).value and alert

# ==== TLS streams =================================================================================
# RFC 4217: data connections under PROT P. OpenSSL works on the non-blocking socket, and Attention waits for it as for any
# other stream. The end of the data must be announced (close_notify), in both directions: a connection that just ends may
# have been cut off by somebody on the way.
#
# A data connection that resumes the TLS session of the control connection belongs to this login. OpenSSL's clients use a
# ticket of TLS 1.3 once (RFC 8446, C.4), so downloads give them a new one. Uploads do not: a client that closes without having
# read it resets the connection, which destroys what it has sent (measured: 31 of 60 uploads by curl). So the control
# connection gives one after each transfer, if resuming may be compulsory. Clients that know no tickets (curl, up to
# TLS 1.2) resume by the session's id: the TLS process hands the session over to the user's process.
#
# hello_name() is all that is ever parsed of TLS outside OpenSSL: SERVER chooses a certificate by it.

HANDSHAKE_SECONDS = 30
GOODBYE_SECONDS = 3.0               # for the other side's close_notify
TLS_CHUNK = 1 << 18                 # bytes given to OpenSSL at once
TLS_GATHERED = 1 << 20              # the same, where records are gathered; measured: with half of it 5 to 10 % slower
RECORD, RECORD_OVERHEAD = 16384, 22     # bytes of data in a record, and besides them
TICKET_SECONDS = 7000               # a little less than OpenSSL's sessions live
NAME_IN_CERTIFICATES = frozenset(b"abcdefghijklmnopqrstuvwxyz0123456789-._")


def tls_reason(error: Exception) -> str:
    """Why TLS or a certificate does not work, in a few words."""
    return getattr(error, "reason", None) or getattr(error, "strerror", None) or str(error)


def hello_name(data: bytes) -> "bytes | None":
    """The host name in the start of a ClientHello; b"" for none, None when more bytes are needed (RFC 8446 4.1.2, RFC
    6066 3).

    SERVER looks at it to choose a certificate. What it cannot understand it leaves to OpenSSL.
    """
    if len(data) < 5:
        return None
    length = int.from_bytes(data[3:5], "big")
    if data[0] != 22 or length > 16384:
        return b""
    if len(data) < 5 + length:
        return None
    try:
        rest = data[5 + 4 + 2 + 32:5 + length]                          # behind type, length, version, random
        rest = rest[1 + rest[0]:]                                       # session id
        rest = rest[2 + int.from_bytes(rest[:2], "big"):]               # cipher suites
        rest = rest[1 + rest[0]:][2:]                                   # compression methods; length of the extensions
        while rest:
            kind, size = int.from_bytes(rest[:2], "big"), int.from_bytes(rest[2:4], "big")
            if kind == 0:
                name = rest[4 + 5:4 + 5 + int.from_bytes(rest[7:9], "big")].lower()
                return name if len(name) < 254 and NAME_IN_CERTIFICATES.issuperset(name) else b""
            rest = rest[4 + size:]
    except IndexError:
        pass
    return b""


class Resumption:
    """TLSSessionReuse (off, auto, on): whether a data connection may be one that does not resume the login's TLS
    session.
    """

    def __init__(self, mode: str, ends: float, renewed: bool) -> None:
        """`ends`: from when on (monotonic) the client's tickets are too old; `renewed`: whether the control connection
        gives one after each transfer.
        """
        self.mode, self.ends, self.renewed = mode, ends, renewed
        self.begun = False                              # a data connection has resumed it: the client can
        self.ticket = True                              # the client has a ticket that it has not used

    def suffices(self, sock: Any, gives_ticket: bool, now: float) -> bool:
        """Whether the data connection is good enough; takes note of what it was."""
        resumed = sock.session_reused
        possible = now < self.ends and (self.ticket or sock.version() != "TLSv1.3")
        if not resumed and (self.mode == "on" or self.mode == "auto" and self.begun and possible):
            return False
        self.begun = self.begun or resumed
        self.ticket = gives_ticket or self.renewed or self.ticket and not resumed
        return True


class TlsStream(Stream):
    """A data connection under TLS (PROT P)."""

    spliced = False

    def __init__(self, sock: socket.socket, attention: Attention, rate: int, idle: float,
                 progress: "Callable[[int], None] | None", tls: ClientTls, loose: bool) -> None:
        """Does the handshake. Raises DataLost when it fails; `sock` is closed then."""
        import ssl
        super().__init__(sock, attention, rate, HANDSHAKE_SECONDS, progress)
        self.at_once(True)
        self.ssl, self.libssl, self.loose = ssl, tls.libssl, loose
        self.outbox: "Outbox | None" = None             # while a large file is sent
        self.ended: "Exception | None" = None           # why nothing more can be received
        self.told_end = False                           # the client has said that it has sent everything
        self.sock: Any = sock
        try:
            self.sock = tls.context.wrap_socket(sock, server_side=True, do_handshake_on_connect=False, suppress_ragged_eofs=False)
            self.patiently(self.sock.do_handshake)
        except BaseException as error:
            self.sock.close()
            if not isinstance(error, (OSError, ValueError)):
                raise
            raise DataLost("the TLS handshake failed: " + tls_reason(error)) from None
        self.acknowledge_at_once()
        self.idle = idle
        self.started = time.monotonic()

    def patiently(self, action: "Callable[..., Any]", *args: Any) -> Any:
        """action(*args), again whenever OpenSSL has to read or write first: with the same arguments, as it demands."""
        while True:
            try:
                return action(*args)
            except self.ssl.SSLWantReadError:
                self.wait_readable()
            except self.ssl.SSLWantWriteError:
                if self.outbox is None:
                    self.wait_writable()
                else:
                    self.empty(self.outbox)

    def at_once(self, yes: bool) -> None:
        """TCP_NODELAY: whether small pieces go out before the last one was acknowledged.

        Measured: without it a client that has just got its ticket gets its data 40 ms later; with it large files are 15 %
        slower.
        """
        try:
            self.sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, yes)
        except OSError:
            pass                                        # it is gone, which its next use tells

    def acknowledge_at_once(self) -> None:
        """TCP_QUICKACK (Linux): Python's clients hold back the end of an upload till its beginning was acknowledged.

        Measured: 2 ms for 4 KiB, without it 44.
        """
        if hasattr(socket, "TCP_QUICKACK"):
            try:
                self.sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_QUICKACK, 1)
            except OSError:
                pass                                    # it is gone, which its next use tells

    def send_some(self, data: "bytes | memoryview") -> int:
        try:
            count = self.patiently(self.sock.send, data if self.outbox else data[:TLS_CHUNK])
        except self.ssl.SSLError as error:
            raise DataLost(tls_reason(error)) from None
        if self.outbox is not None:
            self.empty(self.outbox)
        return count

    def empty(self, outbox: Outbox) -> None:
        """Send all that has gathered. Raises what os.write() does, but for BlockingIOError."""
        while True:
            data = outbox.waiting()
            if not data:
                return
            try:
                outbox.taken(os.write(self.sock.fileno(), data))
            except BlockingIOError:
                self.wait_writable()

    def send_file(self, fd: int, offset: int, end: int) -> None:
        self.at_once(end - offset <= TLS_CHUNK)
        if end - offset <= TLS_CHUNK or self.libssl is None:
            self.send_through(memoryview(bytearray(TLS_CHUNK)), fd, offset, end)
            return
        self.outbox = Outbox(self.libssl, self.sock, TLS_GATHERED + TLS_GATHERED // 64)     # heads and tags: 1 in 500
        try:
            self.send_through(memoryview(bytearray(TLS_GATHERED)), fd, offset, end)
        finally:
            self.outbox.close()
            self.outbox = None

    def whole_segments(self) -> int:
        """How much data fills whole TCP segments as records of TLS 1.3 (RFC 8446 5.2): Nagle's algorithm holds back no end.

        Measured: 10 to 20 % faster on loopback.
        """
        segment = self.sock.getsockopt(socket.IPPROTO_TCP, socket.TCP_MAXSEG)
        size = max(TLS_GATHERED // segment, 1) * segment
        return size + size // -(RECORD + RECORD_OVERHEAD) * RECORD_OVERHEAD

    def send_through(self, buffer: memoryview, fd: int, offset: int, end: int) -> None:
        """send_file() through a buffer.

        An mmap would save a copy, and kill this process with SIGBUS when somebody shortens the file.
        """
        while offset < end:
            most = min(end - offset, len(buffer) if self.outbox is None else self.whole_segments())
            count = os.preadv(fd, [buffer[:most]], offset)
            if not count:
                raise Refuse(*SHORTER)
            self.send(buffer[:count])
            offset += count
            self.attention.check_abort()

    def receive_into(self, buffer: memoryview) -> int:
        """As many records as have come and fit: OpenSSL hands them over one by one, and files like larger pieces."""
        if self.ended is not None:
            raise self.ended
        filled = 0
        try:
            while filled < len(buffer):
                count = self.sock.recv_into(buffer[filled:])
                if not count:
                    self.told_end = True
                    break
                filled += count
        except (self.ssl.SSLWantReadError, self.ssl.SSLWantWriteError):
            if not filled:
                raise BlockingIOError(errno.EAGAIN, "") from None
        except OSError as error:
            self.ended = self.end_of(error)
            if not filled and self.ended is not None:
                raise self.ended from None
        return filled

    def end_of(self, error: OSError) -> "Exception | None":
        """What an error at the end of the data means; None when it is as good as a proper end (TLSLooseClose)."""
        # until 3.9
        ragged = isinstance(error, self.ssl.SSLEOFError) or tls_reason(error) == "UNEXPECTED_EOF_WHILE_READING"
        if ragged and self.loose:
            return None
        return DataLost("closed without close_notify, so what came may not be all" if ragged else tls_reason(error))

    def finish_sending(self) -> None:
        """Send close_notify, and wait a little for the other one: then the client has read everything."""
        self.idle = GOODBYE_SECONDS
        self.at_once(True)
        try:
            self.patiently(self.sock.unwrap)
        except (OSError, ValueError, TimedOut):
            pass                                        # it closed without a word, or does not answer: ours was sent

    def close(self) -> None:
        """Answer the client's close_notify.

        Who breaks off sends none, so that the client knows that something is missing.
        """
        if self.told_end:
            try:
                self.sock.unwrap()
            except (OSError, ValueError):
                pass                                    # it does not wait for it
        self.sock.close()

# ==== Session: one user's process =================================================================
# A session serves one client, so its code is straight: a command is a method, and what waits, waits in Attention. The
# process is the user's for good when it begins here; everything that needed root is already done and lies in Entry:
# descriptors, tables, names. The commands come in three layers, each a class and a section: the loop (SessionLoop),
# files (FileCommands), transfers (Session).

FORBIDDEN_IN_UPLOADS = b".pureftpd-upload."         # the names under which -0 keeps what is not complete yet
CWD_FAILURES_MAX = 50                               # failed CWDs in a row, then goodbye (docwd)
CWD_FAILURE_SECONDS = 0.1                           # the n-th failure waits n times this
LOGS_SECONDS = 5.0                                  # a log that was moved away is noticed so late at most
MESSAGE_LINES, MESSAGE_WIDTH = 100, 511             # of .banner and .message


class Entry(NamedTuple):
    """What the login child hands to the session: all that could not be had any more after chroot and setuid."""
    account: Account
    peer: Peer
    tree: Tree
    control: socket.socket                          # the client's socket, or the relay of its TLS process
    channel: "socket.socket | None"                 # to PRIV
    negotiated: Negotiated
    pending: bytes                                  # what the client has sent already
    root: bytes                                     # where the session's / is on the host: b"" for the real one
    start: bytes                                    # where the session starts, seen from its /
    chrooted: bool
    trusted: bool                                   # a member of -a's group: no dot-file rules, ratios, quotas, -K
    host: str                                       # the client's name (or address), for logs
    names: "tuple[IdNames, IdNames]"                 # of users and groups, for listings
    aliases: "dict[bytes, bytes]"                   # directory aliases
    scoreboard: "ScoreboardEntry | None" = None
    transferlogs: "list[TransferLog] | None" = None
    uploadpipe: "UploadPipe | None" = None
    tls: "ClientTls | None" = None                  # what this login's data connections need for TLS
    utc_offset: int = 0                             # seconds, for listings
    overloaded: bool = False                        # -m: no downloads for anonymous users
    passive_rules: "tuple[Any, ...]" = ()           # -P: (network or None, address)
    tilde: "Callable[[bytes], bytes | None]" = lambda name: None    # home of a system user, for CWD ~name


class SessionLoop(Conversation):
    """Greeting, command loop and replies of a session."""

    logged_in = True

    def __init__(self, options: Any, log: Log, entry: Entry) -> None:
        super().__init__(options, log, entry.negotiated, entry.pending, entry.peer.encrypted, entry.host)
        self.entry, self.account, self.tree, self.control = entry, entry.account, entry.tree, entry.control
        self.attention = Attention(entry.control, entry.channel, self.input)
        self.idle_seconds = float(options.maxidletime)
        self.active_since = time.monotonic()                      # the last command that counts as activity
        self.downloaded = self.uploaded = 0                 # bytes of the whole session
        self.started = time.time()
        self.logs_due = time.monotonic() + LOGS_SECONDS     # when the transfer logs are looked at again

    def run(self) -> None:
        """Serve the client until it goes; returns then."""
        try:
            if self.entry.tls is not None:
                self.take_session_over(self.entry.tls)
            self.reply(230, self.greeting())
            while True:
                self.one_command()
        except Hangup as end:
            self.hang_up(end)
        except TimedOut:
            self.hang_up(Hangup(421, "Idle for %d seconds, goodbye" % self.idle_seconds))
        except Exception:
            self.log.error("bug: " + traceback_text())
            self.hang_up(Hangup(421, "Something went wrong here, sorry"))

    def take_session_over(self, tls: ClientTls) -> None:
        """Read what TlsDoor.hand_session_over() has sent before it asked for the login."""
        try:
            length, = HANDOVER.unpack(self.control.recv(HANDOVER.size, socket.MSG_DONTWAIT))
            data = self.control.recv(length, socket.MSG_DONTWAIT) if length else b""
        except (OSError, struct.error):
            self.log.error("The TLS process did not say whether there is a session to resume")
            raise Hangup() from None
        if data and tls.libssl is not None:
            tls.libssl.session_import(tls.context, data)

    def one_command(self) -> None:
        line = self.attention.next_line(self.idle_seconds)
        answer = self.dispatch(line)
        if answer is not None:
            self.reply(*answer) if isinstance(answer, tuple) else self.send(answer)
        entry = COMMANDS.get(command_split(line)[0])
        if entry is None or entry.idle:
            if time.monotonic() - self.active_since > 2 * self.idle_seconds:
                raise Hangup(421, "Nothing but NOOP for %d seconds, goodbye" % (2 * self.idle_seconds))
        else:
            self.active_since = time.monotonic()

    def reply(self, code: int, text: "str | bytes") -> None:
        if self.options.verboselog > 1:
            self.log.debug("Reply [%d] [%s]" % (code, text if isinstance(text, str) else printable(text)))
        self.send(reply_bytes(code, text))

    def send(self, data: bytes) -> None:
        """Send on the control connection. Raises Hangup when the client does not take it."""
        try:
            self.control.sendall(data)
        except OSError:
            raise Hangup() from None

    def hang_up(self, end: Hangup) -> None:
        """Say goodbye when there is something to say, and close."""
        try:
            if end.args:
                self.reply(*end.args)
                self.control.setblocking(False)
                while self.control.recv(65536):         # unread input would turn our goodbye into a reset
                    pass
        except (Hangup, OSError):
            pass
        finally:
            self.ended()
            try:
                self.control.shutdown(socket.SHUT_RDWR)
            except OSError:
                pass
            self.control.close()

    def ended(self) -> None:
        """The session is over: log it, and give the scoreboard entry back."""
        self.log.info("Logout: %d bytes downloaded, %d bytes uploaded" % (self.downloaded, self.uploaded))
        self.event("logout", downloaded=self.downloaded, uploaded=self.uploaded)
        if self.entry.channel is not None and self.attention.channel_fd >= 0:
            try:
                self.entry.channel.send(PLAIN.pack(REMOVEFTPWHOENTRY, 0))
            except OSError:
                pass                                    # PRIV is gone; readers drop entries of processes that are gone

    def event(self, name: str, **details: Any) -> None:
        """Tell the logs that record events (-O json:) of one."""
        logs = self.logs()
        if logs:
            transferlog_event(logs, name, self.user_shown(), self.host, self.started, **details)

    def logs(self) -> "list[TransferLog]":
        """The transfer logs. PRIV opens them anew for us now and then: logrotate(8) may have moved one away."""
        logs, now = self.entry.transferlogs or [], time.monotonic()
        if logs and now > self.logs_due and self.attention.channel_fd >= 0:
            self.logs_due = now + LOGS_SECONDS
            for log in logs:
                try:
                    kind, fds = self.attention.ask(PLAIN.pack(REOPENLOG, log.index))
                    if kind == ANSWER_FD and fds:
                        transferlog_renew(log, fds[0])
                except (OSError, MessageError):
                    pass                                # PRIV is gone: the old file must do
        return logs

    def user_shown(self) -> bytes:
        return b"ftp" if self.account.anonymous else self.account.name

    def farewell(self) -> str:
        return ("Goodbye. You uploaded %d and downloaded %d kbytes.\nLogout." %
                ((self.uploaded + 1023) // 1024, (self.downloaded + 1023) // 1024))

    def greeting(self) -> bytes:
        """What 230 says: the user's own banner, then where one is."""
        where = self.tree.working_directory()
        if self.account.anonymous:
            last = b"Anonymous user logged in"
        elif self.entry.chrooted and b"/./" not in self.account.home:
            last = b"OK. Current restricted directory is " + where
        else:
            last = b"OK. Current directory is " + where
        return b"\n".join([*self.text_file(b".banner"), *self.quota_lines(), last])

    def quota_lines(self) -> "list[bytes]":
        return []

    def text_file(self, name: bytes) -> "list[bytes]":
        """The lines of .banner or .message in the working directory, fit for a reply; none when there is no such file.
        """
        try:
            fd = self.tree.open(name, os.O_RDONLY | os.O_NOFOLLOW)
        except OSError:
            return []
        try:
            if not stat.S_ISREG(os.fstat(fd).st_mode):
                return []
            data = os.read(fd, MESSAGE_LINES * (MESSAGE_WIDTH + 1))
        except OSError:
            return []
        finally:
            os.close(fd)
        lines = [line.rstrip(b"\r")[:MESSAGE_WIDTH].translate(CONTROL_TO_UNDERSCORE) for line in data.split(b"\n")]
        while lines and not lines[-1]:
            lines.pop()
        return lines[:MESSAGE_LINES]

    def clear_command_channel(self) -> Any:
        """The reply goes out with a descriptor beside it, which tells the relay that it is the last one under TLS."""
        socket.send_fds(self.control, [reply_bytes(200, "The control connection is in the clear now")], [self.control.fileno()])
        self.encrypted = False

    # -- who is in already ---------------------------------------------------------------------------

    def do_user(self, argument: bytes) -> Any:
        """RFC 959 section 4.1.1.

        Compat: an anonymous user may say so again, with or without a password (douser, dopass).
        """
        if self.account.anonymous:
            return 230, "Anonymous user logged in"
        return super().do_user(argument)

    do_pass = do_user

    # -- what waits --------------------------------------------------------------------------------

    @command("SITE", missing=(500, "SITE needs a command: see SITE HELP"))
    def do_site(self, argument: bytes) -> Any:
        verb, argument = command_split(argument)
        row = SITE_COMMANDS.get(verb)
        if row is None:
            raise Refuse(500, "Unknown SITE command: see SITE HELP")
        if row.missing and not argument:
            raise Refuse(*row.missing)
        return getattr(self, row.method)(argument)

    @command("HELP", table=SITE_COMMANDS, help=False)
    def do_site_help(self, argument: bytes) -> Any:
        return self.do_help(argument)

    @command("IDLE", table=SITE_COMMANDS, missing=(501, "SITE IDLE takes seconds"))
    def do_site_idle(self, argument: bytes) -> Any:
        seconds = whole_number(argument, SITE_IDLE_MAX)
        if not seconds:
            raise Refuse(501, "SITE IDLE takes seconds, from 1 to %d" % SITE_IDLE_MAX)
        self.idle_seconds = float(seconds)
        return 200, "Idle time is now %d seconds" % seconds

    @command("TIME", table=SITE_COMMANDS)
    def do_site_time(self, argument: bytes) -> Any:
        return 211, time.strftime("%Y-%m-%d %H:%M:%S")


SITE_IDLE_MAX = 2520                                # seconds, as the original


def traceback_text() -> str:
    """The traceback of the exception in flight, as one line."""
    kind, error, frames = sys.exc_info()
    steps = []
    while frames is not None:
        steps.append("%s:%d" % (frames.tb_frame.f_code.co_name, frames.tb_lineno))
        frames = frames.tb_next
    return "%s: %s at %s" % (kind.__name__ if kind else "?", error, " > ".join(steps))

# ==== Session: files and directories ==============================================================
# RFC 959 section 4.1.3, RFC 3659 (SIZE, MDTM, MLST), draft-somers-ftp-mfxx (MFMT), and SITE. Who may touch which name
# is said in allowed(), once, for all commands; the rest is one system call each, and what that raises is the reply.

MODE_MAX = 0o7777
DENIED = (553, "Names like that are not allowed here")


def leads_with_dot(path: bytes) -> bool:
    """Whether a component of `path` is a dot-file's name; `...` counts, `.` and `..` do not."""
    return any(part[:1] == b"." and part not in (b".", b"..") for part in path.split(b"/"))


class FileCommands(SessionLoop):
    """Commands about names, without data connections."""

    def __init__(self, options: Any, log: Log, entry: Entry) -> None:
        super().__init__(options, log, entry)
        self.renaming: "bytes | None" = None                # RNFR
        self.cwd_failures = 0
        self.least_mode = 0                                 # what SITE CHMOD leaves a directory at least

    def host_path(self, path: bytes) -> bytes:
        """`path` (as the client means it) on the host. Compat: chroot + "/" + absolute path, hence a double slash."""
        return self.entry.root + b"/" + self.tree.absolute(path) if self.entry.root else self.tree.absolute(path)

    def log_path(self, path: bytes) -> bytes:
        """`path` as transfer logs show it: on the host, or in its virtual host."""
        before = self.account.vhost.encode() + b":" if self.account.vhost else self.entry.root
        return before + self.tree.absolute(path)

    def allowed(self, path: bytes, write: bool, removing: bool = False) -> bytes:
        """`path`, when its name may be used so. Raises Refuse(553) (checknamesanity, -x, -X, -z)."""
        dotted = leads_with_dot(path)
        if dotted and not self.entry.trusted:
            if self.account.anonymous:
                refused = write or not self.options.allowdotfiles
            else:
                refused = self.options.prohibitdotfilesread or write and self.options.prohibitdotfileswrite
            if refused:
                raise Refuse(*DENIED)
        if write and not removing and path.rpartition(b"/")[2].startswith(FORBIDDEN_IN_UPLOADS):
            raise Refuse(*DENIED)
        self.quota_guard(path)
        return path

    def quota_guard(self, path: bytes) -> None:
        """Raise Refuse(553) when a user with a quota may not touch this name."""

    def for_users(self, what: str) -> None:
        """Raise Refuse(550) for anonymous users."""
        if self.account.anonymous:
            raise Refuse(550, "Anonymous users may not " + what)

    # -- directories -------------------------------------------------------------------------------

    @command("CWD", "XCWD", idle=True)
    def do_cwd(self, argument: bytes) -> Any:
        """RFC 959 section 4.1.1. Then aliases; then each failure in a row costs a little more time."""
        path = self.expand(argument)
        self.allowed(path, write=False)
        try:
            try:
                self.tree.change_directory(path)
            except OSError:
                if argument not in self.entry.aliases:
                    raise
                self.tree.change_directory(self.entry.aliases[argument])
        except OSError as error:
            self.cwd_failed(argument, error)
        self.cwd_failures = 0
        where = self.tree.working_directory()
        return 250, b"\n".join([*self.text_file(b".message"), b"OK. Current directory is " + where])

    def cwd_failed(self, argument: bytes, error: OSError) -> None:
        self.log.info("Failed CWD %s: %s" % (printable(argument), error.strerror))
        self.cwd_failures += 1
        if self.cwd_failures > CWD_FAILURES_MAX:
            raise Hangup(421, "Too many failures, goodbye")
        try:
            self.attention.pause(self.cwd_failures * CWD_FAILURE_SECONDS)
        except Aborted:
            pass
        raise Refuse(550, b"Can't change directory to %s: %s" % (argument, (error.strerror or "").encode()))

    def expand(self, argument: bytes) -> bytes:
        """The path that CWD means: home for none and `~`, another user's home for `~name` where that exists."""
        if argument in (b"", b"~"):
            return self.entry.start
        if argument.startswith(b"~/"):
            return self.entry.start + b"/" + argument[2:]
        if argument[:1] == b"~" and not self.entry.chrooted and self.account.tilde:
            name, slash, rest = argument[1:].partition(b"/")
            home = self.entry.tilde(name)
            if home:
                return home + slash + rest
        return argument

    @command("CDUP", "XCUP", idle=True)
    def do_cdup(self, argument: bytes) -> Any:
        return self.do_cwd(b"..")

    @command("PWD", "XPWD", idle=True)
    def do_pwd(self, argument: bytes) -> Any:
        """Compat: quotes are doubled, RFC 959 appendix II; the original sends them as they are."""
        return 257, quoted(self.tree.working_directory()) + b" is your current location"

    @command("MKD", "XMKD", missing=(501, "Which directory?"))
    def do_mkd(self, argument: bytes) -> Any:
        """Compat: 257 tells the absolute path with quotes doubled (RFC 959 appendix II), the original its argument."""
        if self.account.anonymous and not self.options.anonymouscancreatedirs:
            raise Refuse(550, "Anonymous users may not create directories")
        path = self.allowed(argument, write=True)
        lines = self.make_directory(path)
        self.cwd_failures = 0
        self.event("mkdir", path=self.log_path(path))
        name = quoted(self.tree.absolute(path)) + b" : directory created"
        return 257, b"\n".join([*lines, name])

    def make_directory(self, path: bytes) -> "list[bytes]":
        """Create it; what 257 says besides."""
        self.tree.mkdir(path, self.directory_mode())
        return []

    def directory_mode(self) -> int:
        return (0o777 & ~self.options.umask[1]) | (0o700 if self.options.customerproof else 0)

    def file_mode(self) -> int:
        return (0o777 & ~self.options.umask[0]) | (0o600 if self.options.customerproof else 0)

    def disk_check(self) -> None:
        """Raise Refuse(552) when the disk is fuller than -k permits."""
        if self.options.maxdiskusagepct is not None:
            disk = self.tree.disk()
            if (disk.f_blocks - disk.f_bavail) * 100 > self.options.maxdiskusagepct * disk.f_blocks:
                raise Refuse(552, "The disk is too full for uploads")

    @command("RMD", "XRMD", missing=(550, "Which directory?"))
    def do_rmd(self, argument: bytes) -> Any:
        self.for_users("remove directories")
        path = self.allowed(argument, write=True)
        try:
            lines = self.remove_directory(path)
        except OSError as error:
            self.log.error("Failed RMD %s: %s" % (printable(argument), error.strerror))
            raise
        self.event("rmdir", path=self.log_path(path))
        return 250, b"\n".join([*lines, b"The directory was removed"])

    def remove_directory(self, path: bytes) -> "list[bytes]":
        self.tree.rmdir(path)
        return []

    # -- files -------------------------------------------------------------------------------------

    @command("DELE", missing=(501, "Which file?"))
    def do_dele(self, argument: bytes) -> Any:
        """A link is deleted itself, a directory never."""
        self.for_users("delete files")
        if self.options.keepallfiles and not self.entry.trusted:
            raise Refuse(550, "Files are kept here")
        path = self.allowed(argument, write=True, removing=True)
        st = self.tree.lstat(path)
        if stat.S_ISDIR(st.st_mode):
            raise Refuse(550, "That is a directory: use RMD")
        lines = self.remove_file(path, st)
        self.log.notice("Deleted " + printable(self.host_path(path)))
        self.event("delete", path=self.log_path(path), size=st.st_size)
        return 250, b"\n".join([*lines, b"Deleted " + argument])

    def remove_file(self, path: bytes, st: os.stat_result) -> "list[bytes]":
        self.tree.unlink(path)
        return []

    @command("RNFR", missing=(550, "Which file?"))
    def do_rnfr(self, argument: bytes) -> Any:
        self.renaming = None
        self.for_users("rename")
        if self.options.norename:
            raise Refuse(550, "Renaming is not allowed here")
        path = self.allowed(argument, write=True)
        self.tree.lstat(path)
        self.renaming = path if path[:1] == b"/" else self.tree.working_directory() + b"/" + path
        return 350, "Now say RNTO"

    @command("RNTO", missing=(550, "To which name?"))
    def do_rnto(self, argument: bytes) -> Any:
        """Compat: a rename that fails is 550, which is final (RFC 959 section 4.2); the original's 451 asks to try
        again.
        """
        if self.renaming is None:
            raise Refuse(503, "First say RNFR")
        path = self.allowed(argument, write=True)
        source, self.renaming = self.renaming, None
        try:
            lines = self.rename_file(source, path)
        except OSError as error:
            self.log.error("Failed RNTO %s: %s" % (printable(argument), error.strerror))
            raise
        self.log.notice("Renamed [%s]->[%s]" % (printable(self.host_path(source)), printable(self.host_path(path))))
        self.event("rename", path=self.log_path(source), to=self.log_path(path))
        return 250, b"\n".join([*lines, b"Renamed"])

    def rename_file(self, source: bytes, target: bytes) -> "list[bytes]":
        self.tree.rename(source, target)
        return []

    @command("SIZE", missing=(501, "Which file?"), feat="SIZE")
    def do_size(self, argument: bytes) -> Any:
        """RFC 3659 section 4. Compat: bytes on disk even under TYPE A (dosize)."""
        return 213, str(self.regular(argument).st_size)

    @command("MDTM", missing=(501, "Which file?"), feat="MDTM")
    def do_mdtm(self, argument: bytes) -> Any:
        """RFC 3659 section 3."""
        return 213, stamp_text(self.regular(argument).st_mtime)

    def regular(self, path: bytes) -> os.stat_result:
        st = self.tree.stat(path)
        if not stat.S_ISREG(st.st_mode):
            raise Refuse(550, "That is no regular file")
        return st

    @command("MFMT", missing=(501, "MFMT takes a time and a file"), feat="MFMT")
    def do_mfmt(self, argument: bytes) -> Any:
        """draft-somers-ftp-mfxx section 3. Compat: impossible times are 501, the original makes others of them."""
        stamp, space, path = argument.partition(b" ")
        if not path:
            raise Refuse(501, "MFMT takes a time and a file")
        self.set_time(stamp, path)
        return 213, b"Modify=%s; %s" % (stamp, path)

    def set_time(self, stamp: bytes, path: bytes) -> None:
        try:
            seconds = stamp_parse(stamp)
        except (ValueError, OverflowError):
            raise Refuse(501, "The time must be YYYYMMDDhhmmss, in UTC") from None
        self.for_users("change times")
        self.tree.utime(self.allowed(path, write=True), seconds)

    @command("UTIME", table=SITE_COMMANDS, missing=(501, "SITE UTIME takes a time and a file"))
    def do_site_utime(self, argument: bytes) -> Any:
        """`TIME FILE`, or `FILE TIME TIME TIME UTC`, of which the first stamp counts."""
        if argument.upper().endswith(b" UTC"):
            words = argument[:-4].rsplit(b" ", 3)
            if len(words) != 4:
                raise Refuse(501, "SITE UTIME takes FILE, three times and UTC")
            self.set_time(words[1], words[0])
        else:
            stamp, _, path = argument.partition(b" ")
            if not path:
                raise Refuse(501, "SITE UTIME takes a time and a file")
            self.set_time(stamp, path)
        return 213, "The time was set"

    @command("CHMOD", table=SITE_COMMANDS, missing=(501, "SITE CHMOD takes a mode and a file"))
    def do_site_chmod(self, argument: bytes) -> Any:
        """Compat: a mode that is not octal is 501, the original takes it for another one."""
        mode_text, _, path = argument.partition(b" ")
        self.for_users("change permissions")
        if self.options.nochmod:
            raise Refuse(550, "Permissions stay as they are here")
        if not path:
            raise Refuse(550, "SITE CHMOD takes a mode and a file")
        if not mode_text or mode_text.strip(b"01234567") or int(mode_text, 8) > MODE_MAX:
            raise Refuse(501, "The mode must be octal, from 0 to 7777")
        mode = int(mode_text, 8)
        st = self.tree.stat(self.allowed(path, write=True))
        is_directory = stat.S_ISDIR(st.st_mode)
        if self.options.customerproof:
            mode |= 0o700 if is_directory else 0o600
        if is_directory and os.path.samestat(st, self.tree.stat(b"/")):
            mode |= 0o700                               # nobody locks themselves out
        if is_directory:
            mode |= self.least_mode
        self.tree.chmod(path, mode)
        self.log.notice("Changed the mode of %s to %o" % (printable(self.host_path(path)), mode))
        return 200, "Permissions changed"

    @command("CHMOD", missing=(501, "CHMOD takes a mode and a file"), help=False)
    def do_chmod(self, argument: bytes) -> Any:
        return self.do_site_chmod(argument)

    @command("ALIAS", table=SITE_COMMANDS)
    def do_site_alias(self, argument: bytes) -> Any:
        """The directory aliases, or what one of them means."""
        if not argument:
            lines = [b" %s %s" % pair for pair in sorted(self.entry.aliases.items())]
            return 214, b"\n".join([b"Directory aliases:", *lines, b"End."])
        if argument not in self.entry.aliases:
            raise Refuse(502, "No such alias")
        return 214, b"%s is an alias for %s" % (argument, self.entry.aliases[argument])

    @command("ALLO", missing=(501, "How many bytes?"))
    def do_allo(self, argument: bytes) -> Any:
        """RFC 959 section 4.1.3: whether so much would fit."""
        words = argument.upper().split()
        size = whole_number(words[0]) if words and (len(words) == 1 or words[1:2] == [b"R"]) else None
        if size is None:
            if words and words[0].isdigit():
                raise Refuse(552, "So much does not fit on any disk")
            raise Refuse(501, "ALLO takes a number of bytes")
        self.disk_check()
        disk = self.tree.disk()
        if size > disk.f_bavail * disk.f_frsize or not self.quota_has_room(size):
            raise Refuse(552, "There is not enough room for that")
        return 200, "There is room for that"

    def quota_has_room(self, size: int) -> bool:
        return True

# ==== Session: transfers and listings =============================================================
# RFC 959 section 4.1.2 and 4.1.3, RFC 2428 (EPSV, EPRT), RFC 3659 (REST, MLSD). A transfer is: may it be (names,
# limits, quota, ratio), the local file, the data connection, 150, the bytes, the end of both, 226. Nothing that was
# there is touched before the data connection stands. An upload that does not end well is never called complete, and
# under -0 never takes the old file's place.

# passive ports without -p. The kernel's own choice is slow once many are used
ANY_PORT = (1024, 65535)
ALIASES_TRIED = 1000                                # -r: NAME.1 ... NAME.999
UPLOADING_NAME = FORBIDDEN_IN_UPLOADS + b"%08x.%04x"
ABORTED = 426, "Aborted"
PRIVATE_BLOCKS = ((10 << 24, 8), (172 << 24 | 16 << 16, 12), (192 << 24 | 168 << 16, 16), (100 << 24 | 64 << 16, 10),
                  (169 << 24 | 254 << 16, 16))      # RFC 1918, RFC 6598, RFC 3927


def address_scope(address: str) -> str:
    """Where an IPv4 address means anything: "loopback", "private" or "public"."""
    number = int.from_bytes(socket.inet_aton(address), "big")
    if number >> 24 == 127:
        return "loopback"
    return "private" if any(number >> (32 - bits) == base >> (32 - bits) for base, bits in PRIVATE_BLOCKS) else "public"


def address_is_loopback(address: str) -> bool:
    address = address_normal(address)
    return address == "::1" if ":" in address else address_scope(address) == "loopback"


def passive_address_problem(shown: str, client: str) -> str:
    """Why a client at `client` will not reach `shown`; "" when it may (IPv4)."""
    here, there = address_scope(shown), address_scope(client)
    if here == "loopback" and there != "loopback" or here == "private" and there == "public":
        return f"the client at {client} is told to connect to {shown}, a {here} address it cannot reach"
    return ""


def rate_text(count: int, seconds: float) -> str:
    """The second line of 226."""
    if not count:
        return "%.3f seconds" % seconds
    return "%.3f seconds, %.2f Mbytes per second" % (seconds, count / max(seconds, 1e-6) / 1048576)


class Upload(NamedTuple):
    """A file that is being received."""
    path: bytes                     # its name in the end, as the client means it
    working: bytes                  # its name meanwhile: the same but under -0
    fd: int
    offset: int                     # where writing begins
    before: int                     # bytes the file had
    created: bool                   # whether there was none
    stamp: int                      # st_mtime_ns of a file that was created
    append: bool                    # APPE: writing begins wherever the file ends then


class Session(FileCommands):
    """A whole session: the commands that open data connections come last."""

    def __init__(self, options: Any, log: Log, entry: Entry) -> None:
        super().__init__(options, log, entry)
        foreign = options.allowanonymousfxp or options.allowuserfxp and not entry.account.anonymous
        family = socket.AF_INET6 if ":" in entry.peer.local_address else socket.AF_INET
        self.offset = 0                                     # REST
        self.extended_only = False                          # EPSV ALL
        self.warned_of_address = False
        self.uploads = 0                                    # STOU's counter
        self.upload_aborted = False                         # by an ABOR whose own turn is to come
        libssl = entry.tls and entry.tls.libssl
        self.resumption = Resumption(options.tlssessionreuse, time.monotonic() + TICKET_SECONDS,
                                     bool(libssl and libssl.new_ticket))
        self.limits_prepare()
        self.port = DataPort(self.attention, entry.peer, family, options.passiveportrange or ANY_PORT, foreign,
                             throttle_buffer(self.rate_up))

    def limits_prepare(self) -> None:
        """Bandwidth, ratio and quota: the account's own, else the server's."""
        account, options = self.account, self.options
        rates = (options.anonymousbandwidth if account.anonymous else None) or options.userbandwidth or (0, 0)
        self.rate_up, self.rate_down = account.bandwidth_ul or rates[0], account.bandwidth_dl or rates[1]
        ratio = options.userratio or (options.anonymousratio if account.anonymous else None) or (0, 0)
        if account.ratio_ul and account.ratio_dl:
            ratio = account.ratio_ul, account.ratio_dl
        self.ratio: "tuple[int, int]" = (0, 0) if self.entry.trusted else (ratio[0], ratio[1])
        files, size = quota_limits(options, account, self.entry.trusted)
        self.quota = Quota(self.tree, files, size, self.log)
        self.least_mode = 0o500 if self.quota.limited else 0        # quotacheck has to look into every directory

    def quota_guard(self, path: bytes) -> None:
        if self.quota.limited and quota_forbids(path):
            raise Refuse(*DENIED)

    def quota_lines(self) -> "list[bytes]":
        return [line.encode() for line in self.quota.lines()] if self.quota.limited else []

    def quota_has_room(self, size: int) -> bool:
        if not self.quota.limited:
            return True
        with self.quota.lock() as account:
            return account.allows(size)

    # -- names that count ----------------------------------------------------------------------------

    def make_directory(self, path: bytes) -> "list[bytes]":
        with self.quota.lock() as account:
            account.claim(1)
            try:
                self.tree.mkdir(path, self.directory_mode())
            except OSError as error:
                account.charge(-1, 0)
                self.log.error("Failed MKD %s: %s" % (printable(path), error.strerror))
                raise
        return self.account_lines(account)

    def remove_directory(self, path: bytes) -> "list[bytes]":
        with self.quota.lock() as account:
            self.tree.rmdir(path)
            account.charge(-1, 0)
        return self.account_lines(account)

    def remove_file(self, path: bytes, st: os.stat_result) -> "list[bytes]":
        with self.quota.lock() as account:
            size = account.counted(path)
            self.tree.unlink(path)
            account.charge(-1, -size)
        return self.account_lines(account)

    def rename_file(self, source: bytes, target: bytes) -> "list[bytes]":
        with self.quota.lock() as account:
            replaced, size = False, 0
            try:
                replaced = not os.path.samestat(self.tree.lstat(source), self.tree.lstat(target))
                size = account.counted(target)
            except OSError:
                pass                                    # nothing is there
            self.tree.rename(source, target)
            if replaced:
                account.charge(-1, -size)
        return self.account_lines(account)

    def account_lines(self, account: QuotaAccount) -> "list[bytes]":
        return [line.encode() for line in self.quota.lines(account)] if self.quota.limited else []

    # -- data connections ----------------------------------------------------------------------------

    @command("PASV", "P@SW", idle=True, feat=lambda self: "PASV" if not self.options.natmode else None)
    def do_pasv(self, argument: bytes) -> Any:
        """RFC 959 section 4.1.2. The address told is -P's for this client, else the control connection's own."""
        self.refuse_passive()
        if self.extended_only:
            raise Refuse(501, "You said EPSV ALL")          # RFC 2428 section 4. Compat: accepted by the original
        if self.port.family == socket.AF_INET6 and ":" in address_normal(self.entry.peer.local_address):
            raise Refuse(425, "PASV is for IPv4: use EPSV")
        address = self.passive_address()
        port = self.port.listen()
        return 227, "Entering Passive Mode (%s,%d,%d)" % (address.replace(".", ","), port >> 8, port & 255)

    def refuse_passive(self) -> None:
        if self.options.natmode:
            raise Refuse(500, "Passive transfers are off here: use PORT or EPRT")

    def passive_address(self) -> str:
        """What PASV tells this client. One line in the log when that cannot work."""
        client = self.entry.peer.address
        address = passive_address_for(self.entry.passive_rules, client)
        if address is None:
            address = address_normal(self.entry.peer.local_address)
        if not self.warned_of_address and ":" not in client:
            problem = passive_address_problem(address, client)
            if problem:
                self.warned_of_address = True
                self.log.warning("PASV cannot work: %s; tell the right address with -P (ForcePassiveIP)" % problem)
        return address

    @command("EPSV", idle=True, feat=lambda self: "EPSV" if not self.options.natmode else None)
    def do_epsv(self, argument: bytes) -> Any:
        """RFC 2428 section 3."""
        self.refuse_passive()
        wanted = argument.strip().upper()
        here = b"2" if ":" in address_normal(self.entry.peer.local_address) else b"1"
        if self.options.brokenclientscompatibility and here == b"1":
            raise Refuse(500, "Use PASV")
        if wanted == b"ALL":
            self.extended_only = True
            return 220, "Only EPSV from now on"
        if wanted not in (b"", here):
            raise Refuse(522, "Network protocol not supported here, use (%s)" % here.decode())
        return 229, "Entering Extended Passive Mode (|||%d|)" % self.port.listen()

    @command("PORT", missing=(501, "PORT takes six numbers"), idle=True)
    def do_port(self, argument: bytes) -> Any:
        return self.active(port_argument, argument)

    @command("EPRT", missing=(501, "EPRT takes |1|address|port|"), idle=True, feat="EPRT")
    def do_eprt(self, argument: bytes) -> Any:
        return self.active(eprt_argument, argument)

    def active(self, parse: "Callable[[bytes], tuple[str, int]]", argument: bytes) -> Any:
        """Connect there next time; never to a port that a service may have, nor to another host (RFC 2577 section 3).
        """
        if self.extended_only:
            raise Refuse(501, "You said EPSV ALL")
        self.port.close()
        address, number = parse(argument)
        if number < 1024 or address in ("0.0.0.0", "::"):
            raise Refuse(501, "That address and port will not do")
        if not self.port.foreign and address_normal(address) != self.entry.peer.address:
            raise Refuse(500, "I connect to %s only, where you are, not to %s" % (self.entry.peer.address, address))
        if address_is_loopback(address) and not address_is_loopback(self.entry.peer.address):
            raise Refuse(500, "My own services are not for you")        # FXP, too, is between two hosts
        self.port.aim(address, number)
        return 200, "I will connect there"

    @command("ESTA", feat="ESTA", help=False)
    def do_esta(self, argument: bytes) -> Any:
        """Connect to the active address now, not when a transfer begins."""
        if self.port.target is None:
            raise Refuse(520, "No active data connection was asked for")
        return self.establish()

    def establish(self) -> Any:
        try:
            self.port.opened = self.port.connect(self.bind_data_port)
        except Aborted:
            raise Refuse(*ABORTED) from None
        return 225, "Connected"

    @command("ESTP", help=False,
             feat=lambda self: "ESTP" if not self.options.natmode and not self.options.forcepassiveip else None)
    def do_estp(self, argument: bytes) -> Any:
        """Accept the passive connection now."""
        if self.port.listener is None:
            raise Refuse(520, "No passive data connection was asked for")
        return self.establish()

    def bind_data_port(self, family: int) -> socket.socket:
        """A socket for an active data connection: bound to port 20 by PRIV, to any port where there is none that can.
        """
        if self.attention.channel_fd >= 0 and os.getuid() != self.options.server_uid:
            try:
                kind, fds = self.attention.ask(PLAIN.pack(BINDRESPORT, 6 if family == socket.AF_INET6 else 4))
                if kind == ANSWER_FD and fds:
                    return socket.socket(fileno=fds[0])
            except (OSError, MessageError):
                pass                                    # PRIV is gone: any port must do
        sock = socket.socket(family, socket.SOCK_STREAM)
        if family == self.port.family:
            sock.bind(address_to_bind(self.entry.peer.local_address, 0))
        return sock

    @command("PRET", idle=True, feat="PRET", help=False)
    def do_pret(self, argument: bytes) -> Any:
        """drftpd's: which command comes after PASV. Wrong ones are told now."""
        verb, name = command_split(argument)
        if verb == b"RETR":
            os.close(self.open_to_send(self.allowed(name, write=False)))
        return 200, "Go on"

    @command("REST", missing=(501, "REST takes an offset"), idle=True, feat="REST STREAM")
    def do_rest(self, argument: bytes) -> Any:
        """RFC 3659 section 5. Compat: 350 in ASCII too, where the transfer then refuses more than 1."""
        self.offset = 0
        offset = whole_number(argument)
        if offset is None:
            raise Refuse(554, "The offset must be a number of bytes")
        self.offset = offset
        return 350, "Restarting at %d" % offset

    def take_offset(self) -> int:
        """REST's offset, used up by the transfer that asks, even if that fails."""
        offset, self.offset = self.offset, 0
        if offset > 1 and not self.negotiated.binary:
            raise Refuse(503, "REST works in binary only: say TYPE I")
        return offset

    @command("ABOR", idle=True)
    def do_abor(self, argument: bytes) -> Any:
        """Nothing is under way when this is run: a transfer that was has ended already.

        Compat: 451 after an upload (dostor).
        """
        self.offset = 0
        if self.upload_aborted:
            self.upload_aborted = False
            return 451, "What had come is kept"
        return 226, "Nothing is under way any more"

    # -- one data connection -------------------------------------------------------------------------

    def transfer(self, begin: "str | bytes", rate: int, move: "Callable[[Stream], None]",
                 progress: "Callable[[int], None] | None" = None, upload: bool = False
                 ) -> "tuple[Stream | None, tuple[int, str] | None]":
        """Make the data connection, say 150, let `move` do its work: (stream, None), or (stream or None, the reply of
        the failure).

        Everything that can go wrong is told here, once, for all commands. Only a Hangup before the first byte passes.
        """
        stream, self.offset = None, 0                   # REST is for the next transfer, and that is any
        try:
            sock = self.port.connect(self.bind_data_port)
            try:
                self.reply(150, begin)
                stream = self.stream(sock, rate, progress, upload)
                self.attention.on_status = lambda: self.reply(213, "%d bytes moved" % (stream.moved if stream else 0))
            except BaseException:
                sock.close()
                raise
            move(stream)
            return stream, None
        except Refuse as refusal:
            return stream, (int(refusal.args[0]), str(refusal.args[1]))
        except Aborted:
            return stream, ABORTED
        except DataLost as loss:
            self.log.warning("The data connection broke: " + str(loss))
            return stream, (426, "The data connection broke: " + str(loss))
        except TimedOut:
            return stream, (426, "Nothing moved for %d seconds" % self.idle_seconds)
        except Hangup:
            if stream is None:
                raise
            # it will be raised again; first the transfer has to be logged
            return stream, (426, "Goodbye")
        except Full:
            return stream, (552, "The quota is used up")
        except OSError as error:
            self.log.error("The transfer failed: %s" % error.strerror)
            return stream, os_error_reply(error)
        finally:
            self.attention.on_status = None
            if stream is not None:
                stream.close()

    def stream(self, sock: socket.socket, rate: int, progress: "Callable[[int], None] | None", upload: bool) -> Stream:
        if self.entry.tls is None or not self.encrypted_data:
            return Stream(sock, self.attention, rate, self.idle_seconds, progress)
        self.entry.tls.context.num_tickets = 0 if upload else 1
        stream = TlsStream(sock, self.attention, rate, self.idle_seconds, progress, self.entry.tls, self.options.tlslooseclose)
        if not self.resumption.suffices(stream.sock, not upload, time.monotonic()):
            stream.close()
            self.log.warning("The data connection did not resume the TLS session of its login (--tlssessionreuse)")
            raise Refuse(522, "The data connection must resume the TLS session of this login")
        return stream

    @property
    def encrypted_data(self) -> bool:
        return self.negotiated.private

    # -- down ----------------------------------------------------------------------------------------

    def open_to_send(self, path: bytes) -> int:
        """A descriptor of a regular file that this user may fetch. Raises OSError, Refuse."""
        fd = self.tree.open(path, os.O_RDONLY)
        st = os.fstat(fd)
        problem = ""
        if not stat.S_ISREG(st.st_mode):
            problem = "That is no regular file"
        elif self.account.anonymous and self.options.antiwarez and st.st_uid == self.account.uid:
            problem = "This file was uploaded by an anonymous user and has to be looked at first"
        elif self.account.anonymous and self.entry.overloaded:
            problem = "The server is too busy for anonymous downloads, try again later"
        if problem:
            os.close(fd)
            raise Refuse(550, problem)
        return fd

    @command("RETR", missing=(501, "Which file?"), data=True)
    def do_retr(self, argument: bytes) -> Any:
        offset = self.take_offset()
        path = self.allowed(argument, write=False)
        try:
            fd = self.open_to_send(path)
        except OSError as error:
            self.log.error("Failed RETR %s: %s" % (printable(argument), error.strerror))
            raise
        try:
            return self.send_whole(path, fd, offset)
        finally:
            os.close(fd)

    def send_whole(self, path: bytes, fd: int, offset: int) -> Any:
        size = os.fstat(fd).st_size
        if offset > size:
            raise Refuse(554, "The file has %d bytes only" % size)
        if not ratio_allows(*self.ratio, self.uploaded, self.downloaded, size - offset):
            raise Refuse(550, "\n".join(ratio_denial(*self.ratio, self.uploaded, self.downloaded)))

        def move(stream: Stream) -> None:
            self.scoreboard(SCOREBOARD_DOWNLOAD, path, size, offset)
            if self.negotiated.binary:
                stream.send_file(fd, offset, size)
            else:
                stream.send_text(fd, offset, size)
            stream.finish_sending()

        begin = "Here it comes"
        if size - offset > 4096:
            begin = "Accepted data connection\n%.1f kbytes to download" % ((size - offset) / 1024)
        stream, failure = None, None
        try:
            stream, failure = self.transfer(begin, self.rate_down, move, self.progress_from(offset))
        finally:
            self.scoreboard(SCOREBOARD_IDLE)
            self.transferred(False, path, stream, failure is None and stream is not None)
        if failure or stream is None:
            return failure
        return 226, "File sent\n" + rate_text(stream.moved, stream.seconds())

    def scoreboard(self, state: int, path: bytes = b"", total: int = 0, offset: int = 0) -> None:
        if self.entry.scoreboard is not None:
            self.entry.scoreboard.update(state, path, total, offset, offset)
        process_title(SESSION_TITLES[state])

    def progress_from(self, offset: int) -> "Callable[[int], None] | None":
        board = self.entry.scoreboard
        return (lambda moved: board.progress(offset + moved)) if board is not None else None

    def transferred(self, upload: bool, path: bytes, stream: "Stream | None", complete: bool, removed: bool = False) -> None:
        """Count and log a transfer that moved, or could have moved, data.

        Compat: one that was over quota is an event only (dostor).
        """
        if stream is None:
            return
        if upload:
            self.uploaded += stream.moved
        else:
            self.downloaded += stream.moved
        seconds = stream.seconds()
        if not self.log.silent:
            self.log.notice("%s %s  (%d bytes, %.2fKB/sec)%s" % (
                printable(self.host_path(path)), "uploaded" if upload else "downloaded", stream.moved,
                stream.moved / max(seconds, 1e-6) / 1024, "" if complete else " incomplete"))
        logs = [log for log in self.logs() if not removed or log.form == "json"]
        if logs:
            transferlog_write(logs, Transfer(
                upload, self.log_path(self.tree.real(path)), stream.moved, seconds, self.user_shown(), self.host, self.started,
                not self.negotiated.binary, complete))

    # -- up ------------------------------------------------------------------------------------------

    @command("STOR", missing=(501, "Under which name?"), data=True)
    def do_stor(self, argument: bytes) -> Any:
        offset = self.take_offset()
        return self.receive(argument, offset, append=False)

    @command("APPE", missing=(501, "To which file?"), data=True)
    def do_appe(self, argument: bytes) -> Any:
        self.take_offset()
        return self.receive(argument, 0, append=True)

    @command("STOU", data=True)
    def do_stou(self, argument: bytes) -> Any:
        """RFC 1123 section 4.1.2.9: 150 tells the name that was chosen."""
        self.take_offset()
        self.uploads += 1
        name = b"pureftpd.%08x.%02x.%04x" % (int(time.time()), os.getpid() & 255, self.uploads)
        return self.receive(name, 0, append=False, begin=b"FILE: " + name)

    def receive(self, argument: bytes, offset: int, append: bool, begin: bytes = b"Send it") -> Any:
        path = self.allowed(argument, write=True)
        if self.account.anonymous and self.options.anonymouscantupload:
            raise Refuse(550, "Anonymous users may not upload")
        self.disk_check()
        with self.quota.lock() as account:
            try:
                upload = self.upload_begin(path, offset, append)
            except Refuse as refusal:
                self.log.error("Failed %s %s: %s" % ("APPE" if append else "STOR", printable(argument), refusal.args[1]))
                raise
            self.upload_claim(upload, account)
            meter = account.meter(upload.fd, 0, 0) if upload.created and self.quota.limited else None
        try:
            return self.receive_whole(upload, meter, begin)
        finally:
            os.close(upload.fd)

    def upload_begin(self, path: bytes, offset: int, append: bool) -> Upload:
        """Open what an upload will write, leaving what is there as it is. Raises Refuse, OSError."""
        st = self.lstat_or_none(path)
        if st is not None:
            fresh = self.options.autorename and not append and not offset
            self.upload_check(st, fresh)
            if fresh:
                path, st = self.free_name(path), None
        size = st.st_size if st is not None else 0
        if offset > size:
            raise Refuse(554, "The file has %d bytes only" % size)      # RFC 1123 section 4.1.3.4
        if append:
            offset = size
        working = path
        # what grows in place loses nothing
        if self.options.notruncate and not (offset or append or self.options.autorename):
            working = path[:path.rfind(b"/") + 1] + UPLOADING_NAME % (os.getpid(), int.from_bytes(os.urandom(2), "big"))
        created = st is None or working != path
        flags = os.O_WRONLY | os.O_NOFOLLOW | (os.O_CREAT | os.O_EXCL if created else 0)
        try:
            fd = self.tree.open(working, flags, self.file_mode())
        except OSError as error:
            raise Refuse(OS_ERROR_REPLIES.get(error.errno or 0, 553), error.strerror or "It cannot be written") from None
        stamp = os.fstat(fd).st_mtime_ns if created else 0
        return Upload(path, working, fd, offset, size if working == path else 0, created, stamp, append)

    def lstat_or_none(self, path: bytes) -> "os.stat_result | None":
        try:
            return self.tree.lstat(path)
        except FileNotFoundError:
            return None
        except OSError as error:
            raise Refuse(553, error.strerror or "It cannot be written") from None

    def upload_check(self, st: os.stat_result, fresh: bool) -> None:
        """Raise Refuse when what is there may not be replaced (`fresh`: it will not be). Links are not followed."""
        if fresh:
            return
        if not stat.S_ISREG(st.st_mode):
            raise Refuse(553, "That is no regular file")
        if self.account.anonymous and st.st_size:
            raise Refuse(550, "Anonymous users may not overwrite files")

    def free_name(self, path: bytes) -> bytes:
        """-r: the first of PATH.1, PATH.2 ... that is not taken."""
        for number in range(1, ALIASES_TRIED):
            name = b"%s.%d" % (path, number)
            if self.lstat_or_none(name) is None:
                return name
        raise Refuse(553, "There are too many files of that name")

    def receive_whole(self, upload: Upload, meter: "QuotaMeter | None", begin: bytes) -> Any:
        """The data connection's part of an upload, and what comes of it."""

        def move(stream: Stream) -> None:
            nonlocal upload, meter
            if meter is None:
                upload, meter = self.upload_start(upload)
            self.scoreboard(SCOREBOARD_UPLOAD, upload.path, 0, upload.offset)
            if self.negotiated.binary:
                stream.receive_file(upload.fd, meter.room)
            else:
                stream.receive_text(upload.fd, meter.room)
            self.attention.poll_with_commands(0)            # an end because of ABOR, or of the client's own, is none

        stream: "Stream | None" = None
        failure: "tuple[int, str] | None" = (451, "The upload broke off")
        try:
            stream, failure = self.transfer(begin, self.rate_up, move, self.progress_from(upload.offset), True)
        finally:
            self.scoreboard(SCOREBOARD_IDLE)
            lines, failure = self.upload_end(upload, meter, stream is not None, failure)
            self.transferred(True, upload.path, stream, failure is None, failure is not None and failure[0] == 552)
            if self.entry.uploadpipe is not None and stream is not None and self.is_kept(upload, failure):
                uploadpipe_write(self.entry.uploadpipe, self.user_shown(),
                                 self.entry.root + self.tree.real(upload.path), self.log)
        self.upload_aborted = failure == ABORTED and stream is not None
        if failure or stream is None:
            return failure
        return 226, b"\n".join([*lines, b"File stored", rate_text(stream.moved, stream.seconds()).encode()])

    def upload_claim(self, upload: Upload, account: QuotaAccount) -> None:
        """Charge the new name. Of accounts with a quota, and of anonymous users, no two sessions write the same file.

        Raises Refuse, leaving nothing behind.
        """
        if not (self.quota.limited or self.account.anonymous):
            return
        try:
            if not account.hold(upload.fd):
                raise Refuse(450, "Another session is writing this file")
            try:
                self.upload_check(os.fstat(upload.fd), False)           # who held it until now may have filled it
                account.claim(1 if upload.created else 0, upload.before - upload.offset)
            except Refuse:
                if upload.created:
                    self.tree.unlink(upload.working)
                raise
        except Refuse:
            os.close(upload.fd)
            raise

    def upload_start(self, upload: Upload) -> "tuple[Upload, QuotaMeter]":
        """The data connection stands: what is in the file from the offset on goes.

        That is looked up anew: while the client was waited for, other sessions may have written the file. Raises Refuse.
        """
        before = os.fstat(upload.fd).st_size
        if upload.created and not before:
            return upload, QuotaMeter(self.quota, upload.fd, 0, 0)      # without limits: see receive()
        with self.quota.lock() as account:
            offset = before if upload.append else upload.offset
            if offset > before:
                raise Refuse(451, "The file has %d bytes only by now" % before)
            if before > offset or not (upload.created or upload.append):
                os.ftruncate(upload.fd, offset)                         # of an empty file, too: discard() of others sees it
            os.lseek(upload.fd, offset, os.SEEK_SET)
            return upload._replace(offset=offset, before=before), account.meter(upload.fd, before, offset)

    def upload_end(self, upload: Upload, meter: "QuotaMeter | None", began: bool, failure: "tuple[int, str] | None"
                   ) -> "tuple[list[bytes], tuple[int, str] | None]":
        """Keep, publish or remove what came, and charge what it is: (lines for the reply, the failure if there is
        one).
        """
        over_quota = failure is not None and failure[0] == 552 and meter is not None
        discard = upload.created and (not began or over_quota or failure is not None and upload.working != upload.path)
        with self.quota.lock() as account:
            try:
                if over_quota:
                    os.ftruncate(upload.fd, upload.offset)          # what was there before stays, as far as it does
                if not discard and upload.working != upload.path:
                    self.publish(upload, account)
            except (Refuse, OSError) as error:
                failure = error.args if isinstance(error, Refuse) else os_error_reply(error)
                discard = discard or upload.working != upload.path
            if discard:
                failure = self.discard(upload, account, began) or failure
            if meter is None and not upload.created:
                meter = QuotaMeter(self.quota, upload.fd, upload.before, upload.before)     # it may have been deleted
            if meter is not None:
                meter.settle(account)
        return self.account_lines(account), failure

    @staticmethod
    def is_kept(upload: Upload, failure: "tuple[int, str] | None") -> bool:
        """Whether an upload script should see the file: not what was removed again (over quota, broken off under -0).
        """
        return failure is None or failure[0] != 552 and upload.working == upload.path

    def discard(self, upload: Upload, account: QuotaAccount, began: bool) -> "tuple[int, str] | None":
        """Remove what was begun: the reply to a failure, None otherwise.

        Not when another session has given its name to another file meanwhile, or before anything came has written this one.
        """
        try:
            named, st = self.tree.lstat(upload.working), os.fstat(upload.fd)
            if os.path.samestat(named, st) and (began or (st.st_size, st.st_mtime_ns) == (0, upload.stamp)):
                self.tree.unlink(upload.working)
                account.charge(-1, 0)
        except FileNotFoundError:
            pass
        except OSError as error:
            return os_error_reply(error)
        return None

    def publish(self, upload: Upload, account: QuotaAccount) -> None:
        """-0: the complete upload takes the place of the old file. Raises Refuse, OSError."""
        try:
            replaced = account.counted(upload.path)
            self.upload_check(self.tree.lstat(upload.path), False)
            self.tree.rename(upload.working, upload.path)
            account.charge(-1, -replaced)
        except FileNotFoundError:
            self.tree.rename(upload.working, upload.path)

    # -- listings ------------------------------------------------------------------------------------

    def view(self) -> ListView:
        options, (files, depth) = self.options, self.options.limitrecursion
        return ListView(*self.entry.names, self.account.anonymous, options.brokenclientscompatibility, options.displaydotfiles,
                        files, depth, self.entry.utc_offset, self.facts())

    def send_listing(self, listing: Listing) -> Any:
        def move(stream: Stream) -> None:
            for block in listing:
                stream.send(block)
            stream.finish_sending()

        try:
            stream, failure = self.transfer("Here it comes", self.rate_down, move)
        finally:
            listing.close()
        if failure:
            return failure
        lines = [b"Options: " + listing.options.encode()] if listing.options else []
        lines += listing.notes
        if listing.truncated:
            lines.append(b"The listing was cut off after %d entries" % listing.count)
        return 226, b"\n".join([*lines, b"%d matches total" % listing.count])

    @command("LIST", data=True)
    def do_list(self, argument: bytes) -> Any:
        return self.send_listing(list_blocks(self.tree, argument, self.view()))

    @command("NLST", data=True)
    def do_nlst(self, argument: bytes) -> Any:
        return self.send_listing(nlst_blocks(self.tree, argument, self.view()))

    @command("MLSD", data=True, feat="MLSD")
    def do_mlsd(self, argument: bytes) -> Any:
        return self.send_listing(mlsd_blocks(self.tree, argument, self.view()))

    @command("MLST", data=True, feat=lambda self: "MLST " + facts_feature(self.facts()))
    def do_mlst(self, argument: bytes) -> Any:
        """RFC 3659 section 7.2."""
        line = mlst_line(self.tree, argument, self.view()).translate(CONTROL_TO_UNDERSCORE)
        return b"250-Begin\r\n " + line + b"\r\n250 End.\r\n"

    @command("STAT")
    def do_stat(self, argument: bytes) -> Any:
        """RFC 959 section 4.1.3: the session, or a listing over the control connection."""
        if argument:
            listing = list_blocks(self.tree, argument, self.view())
            self.send(b"213-STAT\r\n")
            # whole lines. Compat: none may look like the last (RFC 959, 4.2)
            for block in listing:
                self.send((b"\n" + block).replace(b"\n213 ", b"\n 213 ")[1:])
            return 213, "End."
        kind = "8-bit binary" if self.negotiated.binary else "ASCII"
        safety = "private" if self.negotiated.private else "clear"
        return 211, b"\n".join([
            b"Status of this session:", b" Logged in as " + self.account.name.translate(CONTROL_TO_UNDERSCORE),
            b" From " + self.entry.peer.address.encode(), (" TYPE %s, data %s" % (kind, safety)).encode(), b"End."])


SESSION_TITLES = {
    SCOREBOARD_IDLE: "pure-ftpd (IDLE)",
    SCOREBOARD_DOWNLOAD: "pure-ftpd (DOWNLOADING)",
    SCOREBOARD_UPLOAD: "pure-ftpd (UPLOADING)",
}


def quota_limits(options: Any, account: Account, trusted: bool) -> "tuple[int | None, int | None]":
    """(files, bytes) that the account may keep, None for no limit: its own, else -n's."""
    if trusted or account.anonymous:
        return None, None
    files, size = options.quota or (None, None)
    return (account.quota_files if account.quota_files is not None else files,
            account.quota_size if account.quota_size is not None else size)


def passive_address_for(rules: "tuple[Any, ...]", client: str) -> "str | None":
    """What -P tells a client: the address of the first rule whose network holds it; None when no rule does."""
    for network, address in rules:
        if network is None or network.holds(client):
            return address
    return None

# ==== Defender ====================================================================================
# Guessing passwords is made slow where all visitors meet: in SERVER, per address (IPv6: per /64, which one customer
# has), over all connections of that address. Every failed check raises the address's level by one, and time lowers it
# again: what leads to a ban is forgotten after DEFENDER_MEMORY ban times. From DEFENDER_FREE on each check must wait
# for a pause that doubles, and only one is made at a time; at ban_after the address is banned for ban_time. A check
# counts from its start: delay() starts none that could, if all those running failed, go beyond the limit, so opening
# many connections makes nothing faster. A success only takes its own check back: who guesses others' passwords cannot
# wash himself clean with his own.
#
# The caller's side of a try:   wait = delay(address, now)    > 0: ask again after so many seconds, 0.0: check it now
#                               succeeded(address) | failed(address, now) | withdrawn(address)
# and of a visitor:             banned(address, now)          > 0: send them away

DEFENDER_FREE = 3                   # failures without consequences: people mistype
DEFENDER_PARALLEL = 8               # checks at a time of an address that is not suspect: clients open many connections
DEFENDER_PAUSE_MAX = 30.0           # seconds
DEFENDER_MEMORY = 6                 # ban times; so guessing once in DEFENDER_PAUSE_MAX still ends in a ban
DEFENDER_BUSY = 0.5                 # seconds after which to ask again when others of the address are being checked
DEFENDER_ADDRESSES = 8192           # remembered at most; the one heard of longest ago is forgotten first


class Suspect:
    """What is known about one address (IPv4) or network (IPv6, /64)."""

    __slots__ = ("level", "stamp", "pending", "next", "ban_end")

    def __init__(self, now: float) -> None:
        self.level = 0              # failures, less those that time has forgiven
        self.stamp = now            # since when the next one is being forgiven
        self.pending = 0            # checks that have started and not ended
        self.next = now             # before this no check starts
        self.ban_end = 0.0


class Defender:
    """Pure logic: `now` is time.monotonic(), and nothing here waits, logs or sends."""

    def __init__(self, ban_after: int = 20, ban_time: float = 600.0, never: "tuple[Network, ...]" = (),
                 addresses: int = DEFENDER_ADDRESSES) -> None:
        """`never`: networks that are neither slowed nor banned; ban_after 0: nobody is; ban_time: seconds."""
        from collections import OrderedDict
        self.ban_after, self.ban_time, self.never, self.addresses = ban_after, ban_time, never, addresses
        self.suspects: "OrderedDict[bytes, Suspect]" = OrderedDict()        # the most recently heard of last

    def delay(self, address: str, now: float) -> float:
        """Seconds to wait before asking again; 0.0: the check starts now, and one of the three below must end it."""
        suspect = self.suspect(address, now, create=True)
        if suspect is None:
            return 0.0
        if suspect.ban_end > now:
            return suspect.ban_end - now
        if suspect.next > now:
            return suspect.next - now
        room = DEFENDER_PARALLEL if suspect.level < DEFENDER_FREE else 1
        if suspect.pending >= max(1, min(room, self.ban_after - suspect.level)):
            return DEFENDER_BUSY
        suspect.pending += 1
        return 0.0

    def failed(self, address: str, now: float) -> "tuple[float, bool]":
        """A check has ended badly: seconds until the address's next one, and whether this one has banned it."""
        suspect = self.suspect(address, now, create=True)
        if suspect is None:
            return 0.0, False
        suspect.pending = max(0, suspect.pending - 1)
        suspect.level += 1
        excess = suspect.level - DEFENDER_FREE
        pause = min(2.0 ** min(excess, 16), DEFENDER_PAUSE_MAX) if excess >= 0 else 0.0
        suspect.next = max(suspect.next, now + pause)
        fresh = suspect.level >= self.ban_after and suspect.ban_end <= now
        if fresh:
            suspect.ban_end = now + self.ban_time
        return pause, fresh

    def succeeded(self, address: str) -> None:
        """A check has ended well: it does not count."""
        self.withdrawn(address)

    def withdrawn(self, address: str) -> None:
        """A check came to nothing by no fault of the client's (a back end is broken): it does not count either."""
        key = address_key(address)
        suspect = self.suspects.get(key)
        if suspect is not None:
            suspect.pending = max(0, suspect.pending - 1)
            if not suspect.pending and not suspect.level:
                del self.suspects[key]

    def banned(self, address: str, now: float) -> float:
        """Seconds that the address's ban still lasts; 0.0 when there is none."""
        suspect = self.suspect(address, now)
        return max(0.0, suspect.ban_end - now) if suspect else 0.0

    def suspect(self, address: str, now: float, create: bool = False) -> "Suspect | None":
        """The entry of `address`, its level as of `now`. None: unknown and not to be created, or never suspected."""
        if not self.ban_after or any(network.holds(address) for network in self.never):
            return None
        key = address_key(address)
        suspect = self.suspects.get(key)
        if suspect is None:
            if not create:
                return None
            self.make_room()
            suspect = self.suspects[key] = Suspect(now)
        self.suspects.move_to_end(key)
        step = self.ban_time * DEFENDER_MEMORY / self.ban_after
        forgiven = int((now - suspect.stamp) / step)
        if forgiven >= suspect.level:
            suspect.level, suspect.stamp = 0, now
        else:
            suspect.level, suspect.stamp = suspect.level - forgiven, suspect.stamp + forgiven * step
        return suspect

    def make_room(self) -> None:
        """Forget the entry that was used longest ago and is not being checked, when there are as many as may be."""
        if len(self.suspects) >= self.addresses:
            oldest = next((key for key, suspect in self.suspects.items() if not suspect.pending), None)
            if oldest is not None:
                del self.suspects[oldest]


def address_key(address: str) -> bytes:
    """Under which key an address is counted: IPv4's 4 bytes (IPv4-mapped ones too), IPv6's first 8, else its text."""
    address = address_text(address)
    try:
        return socket.inet_pton(socket.AF_INET6 if ":" in address else socket.AF_INET, address)[:8]
    except OSError:
        return address.encode()

# ==== SERVER: everybody who has not logged in =====================================================
# One process, one selectors loop for all visitors on all listening sockets: a visitor costs a socket and a small
# object, however long they wait or however slowly they type. It is unprivileged for good, sits in an empty directory,
# and never forks. What takes time happens elsewhere (passwords are checked by the login child that PRIV forks) or is
# a timer here (delays of wrong logins).
#
# A Visitor is the Conversation before the login. What it cannot do itself it asks of its `door`: Server here, TlsDoor
# in the process of a client that said AUTH TLS.

LOGIN_SECONDS = 120                 # for each step to the login. Compat: the original grants the idle time
LOGIN_FAILURES_MAX = 6              # wrong passwords, then goodbye
# the n-th wrong password's reply waits n times this, and up to as much more by chance
FAILURE_SECONDS = 3.0
ACCEPT_AT_ONCE = 64                 # new visitors per round of the loop, so that the others get their turn
VISITOR_READ = 4096                 # bytes
ANONYMOUS_NAMES = (b"ftp", b"anonymous")
HELLO_MAX = 16384 + 5               # bytes of a TLS record, where a ClientHello fits in
LOGIN_LINES = {                     # what a visitor hears instead of 230, before the connection is closed
    VERDICT_BROKEN: (421, "Logging in is not possible now, try again later"),
    VERDICT_LIMIT: (421, "This account has as many sessions as it may have"),
}
WRONG_LINE = (530, "Login authentication failed")


class Visitor(Conversation):
    """Somebody who has not logged in."""

    __slots__ = ("door", "sock", "peer", "user", "failures", "output", "parked", "id", "closing", "hello")

    def __init__(self, door: Any, sock: Any, peer: Peer, options: Any, log: Log, negotiated: "Negotiated | None" = None) -> None:
        super().__init__(options, log, negotiated or Negotiated(), b"", peer.encrypted, peer.address)
        self.door, self.sock, self.peer = door, sock, peer
        self.user: "bytes | None" = None
        self.failures = 0
        self.output = b""                   # replies that the client has not taken yet
        self.parked = False                 # no command is run: a login is being checked, or its delay passes
        self.id = 0                         # of the login that is being checked
        self.hello = 0                      # TLS begins: so many bytes of its ClientHello are awaited
        self.closing = False                # once `output` is sent, it is over

    def run_lines(self) -> None:
        """Run the commands that have come, until one has to wait. Raises Hangup."""
        while not (self.parked or self.output or self.closing):
            line = self.input.line()
            if line is None:
                return
            answer = self.dispatch(line)
            if line[:4].upper() == b"PASS":
                wipe(line)
                self.input.wipe()
            if answer is not None:
                self.reply(*answer)

    def reply(self, code: int, text: "str | bytes") -> None:
        if self.options.verboselog > 1:
            self.log.debug("Reply [%d] [%s]" % (code, text if isinstance(text, str) else printable(text)))
        self.output += reply_bytes(code, text)
        self.door.flush(self)

    def log_command(self, verb: bytes, argument: bytes) -> None:
        self.log.who = "?@" + self.host
        super().log_command(verb, argument)

    # -- the login -----------------------------------------------------------------------------------

    def do_user(self, argument: bytes) -> Any:
        """RFC 959 section 4.1.1. Compat: 230 at once for anonymous users, unless -b."""
        if self.options.tls >= 2 and not self.encrypted:
            raise Refuse(530, "This server wants TLS: say AUTH TLS first")
        if not argument and self.options.noanonymous:
            raise Hangup(530, "USER needs a name")
        self.user = argument[:USER_MAX]
        if self.is_anonymous() and not self.options.brokenclientscompatibility:
            return self.door.begin_login(self, b"", b"")
        return 331, b"User %s OK. Password required" % self.user if not self.is_anonymous() else "Any password will do"

    def is_anonymous(self) -> bool:
        """Whether the name that was given is an anonymous user's here (-e, -E, -V)."""
        if self.options.noanonymous:
            return False
        return (self.options.anonymousonly or not self.user or self.user.lower() in ANONYMOUS_NAMES
                or not access_is_trusted(self.options.trustedip, self.peer))

    def do_pass(self, argument: bytes) -> Any:
        if self.user is None:
            raise Refuse(530, "Say USER first")
        if len(argument) > PASSWORD_MAX:
            raise Refuse(530, "That password is too long")
        self.door.progress(self)
        if self.is_anonymous():
            return self.door.begin_login(self, b"", b"")
        return self.door.begin_login(self, self.user, argument)

    def start_tls(self) -> Any:
        if self.encrypted:
            return super().start_tls()
        return self.door.start_tls(self)

    def login_request(self, number: int, user: bytes, password: bytes) -> bytes:
        """The LOGIN message for PRIV."""
        self.id, self.parked = number, True
        return login_message(LoginRequest(number, user, password, self.negotiated, self.input.pending()[:PENDING_MAX]))

    def refused(self, verdict: int) -> float:
        """The login failed: seconds after which refused_now() may say so."""
        if verdict in LOGIN_LINES:
            return 0.0
        self.failures += 1
        return FAILURE_SECONDS * (self.failures + int.from_bytes(os.urandom(2), "big") / 65536)

    def refused_now(self, verdict: int) -> None:
        """Tell of it, and go on with the commands that came meanwhile. Raises Hangup."""
        self.parked = False
        if verdict in LOGIN_LINES:
            raise Hangup(*LOGIN_LINES[verdict])
        if self.failures >= LOGIN_FAILURES_MAX:
            raise Hangup(*WRONG_LINE)
        self.reply(*WRONG_LINE)
        self.run_lines()


class Greeting:
    """The lines of 220. Everything that does not change is made once."""

    def __init__(self, options: Any) -> None:
        self.options = options
        notes = []
        if options.anonymousonly:
            notes.append("Only anonymous FTP is allowed here")
        if options.noanonymous:
            notes.append("This is a private system - No anonymous login")
        if options.allowanonymousfxp:
            notes.append("FXP is possible for everybody, even between other servers")
        for who, ratio in (("Anonymous users", options.anonymousratio), ("All users", options.userratio)):
            if ratio:
                notes.append("%s: for %d downloaded bytes, upload %d" % (who, ratio[1], ratio[0]))
        minutes, seconds = divmod(int(options.maxidletime), 60)
        self.notes = notes
        self.idle = "You will be disconnected after %s of inactivity" % (
            "%d minutes" % minutes if options.maxidletime >= 120 else "%d seconds" % (minutes * 60 + seconds))
        self.fortunes = fortunes_read(options.fortunesfile) if options.fortunesfile else []

    def text(self, number: int, port: int) -> "str | bytes":
        """What 220 says to client `number` on `port`."""
        if self.fortunes:
            fortune = self.fortunes[int.from_bytes(os.urandom(4), "big") % len(self.fortunes)]
            return b"\n".join([fortune, *(note.encode() for note in self.notes)])
        tls = " with TLS" if self.options.tls else ""
        count = ["You are user number %d of %d allowed" % (number, self.options.maxclientsnumber)] if number else []
        return "\n".join([f"---------- Welcome to pureftpd.py [privsep]{tls} ----------", *count,
                          "Local time is now %s, server port %d" % (time.strftime("%H:%M"), port), *self.notes, self.idle])


def fortunes_read(path: str) -> "list[bytes]":
    """The texts of a fortune(6) file, each fit for a reply. Raises ConfigError."""
    try:
        fd = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
        with open(fd, "rb") as file:
            st = os.fstat(fd)
            if not stat.S_ISREG(st.st_mode) or not st.st_mode & stat.S_IROTH:
                raise ConfigError(f"-F {path}: must be a regular file that everybody may read")
            texts = file.read(1 << 20).replace(b"\r", b"").split(b"\n%\n")
    except OSError as error:
        raise ConfigError(f"-F {path}: {error.strerror}") from None
    lines = [text.rstrip(b"%\n").strip(b"\n").split(b"\n") for text in texts]
    found = [b"\n".join(line.expandtabs().translate(CONTROL_TO_UNDERSCORE) for line in text) for text in lines if any(text)]
    if not found:
        raise ConfigError(f"-F {path}: there is no text in it")
    return found


class Listener(NamedTuple):
    """A listening socket, and what asked for it."""
    family: int
    address: "tuple[Any, ...]"              # as it was asked for: port 0 is any
    implicit: bool                          # its clients begin with TLS (--tlsbind)
    sock: socket.socket


class Server:
    """The loop, and what it knows of each client of this machine."""

    def __init__(self, options: Any, log: Log, channel: socket.socket, listeners: "list[Listener]",
                 sessions: "dict[int, str]", defender: Defender, greeting: Greeting, last_id: int = 0) -> None:
        self.options, self.log, self.channel, self.listeners = options, log, channel, listeners
        self.sessions = sessions                            # id of the login: address of its client
        self.defender = defender
        # by descriptor, the one that made no progress for longest first
        self.visitors: "dict[int, Visitor]" = {}
        self.since: "dict[int, float]" = {}                 # by descriptor: when it made progress
        self.checking: "dict[int, Visitor]" = {}            # by id of the login
        # by PRIV's number: address of a TLS client whose login is checked
        self.consulted: "dict[int, str]" = {}
        self.per_address: "dict[str, int]" = {}
        for address in sessions.values():
            self.count(address)
        self.timers: "list[tuple[float, int, Callable[[], None]]]" = []     # a heap
        self.timer_count = 0
        self.last_id = last_id                              # of a login; the high byte tells SERVERs from each other
        self.greeting = greeting
        self.running, self.draining, self.full = True, False, False
        channel.setblocking(False)
        self.spare = os.dup(channel.fileno())               # given up for a moment when descriptors run out
        self.selector = selectors.DefaultSelector()
        self.selector.register(channel, selectors.EVENT_READ, self.on_channel)
        for listener in listeners:
            listener.sock.setblocking(False)
            self.selector.register(listener.sock, selectors.EVENT_READ, self.accepting(listener))

    def run(self) -> None:
        """Serve until PRIV says STOP or is gone, or (draining) until nobody is left."""
        while self.running:
            now = time.monotonic()
            for key, _ in self.selector.select(self.pause(now)):
                key.data(key.fileobj)
            now = time.monotonic()
            self.run_timers(now)
            self.expire(now)
            if self.draining and not self.visitors and not self.checking:
                return

    def pause(self, now: float) -> "float | None":
        """Seconds till something is due; None: nothing is."""
        due = [self.timers[0][0]] if self.timers else []
        if self.since:
            due.append(next(iter(self.since.values())) + LOGIN_SECONDS)
        return max(0.0, min(due) - now) if due else None

    def at(self, when: float, action: "Callable[[], None]") -> None:
        """Run `action` at `when` (monotonic)."""
        self.timer_count += 1
        heappush(self.timers, (when, self.timer_count, action))

    def run_timers(self, now: float) -> None:
        while self.timers and self.timers[0][0] <= now:
            heappop(self.timers)[2]()

    def expire(self, now: float) -> None:
        """Send away who has made no progress for too long."""
        while self.since:
            fd, since = next(iter(self.since.items()))
            if since + LOGIN_SECONDS > now:
                return
            if self.visitors[fd].parked and not self.visitors[fd].hello:
                self.progress(self.visitors[fd])
            else:
                self.hang_up(self.visitors[fd], Hangup(421, "Timeout: nobody logged in, goodbye"))

    # -- coming and going ----------------------------------------------------------------------------

    def accepting(self, listener: Listener) -> "Callable[[Any], None]":
        return lambda _: self.on_accept(listener.sock, listener.implicit)

    def on_accept(self, listener: socket.socket, implicit: bool) -> None:
        for _ in range(ACCEPT_AT_ONCE):
            try:
                sock, address = listener.accept()
            except BlockingIOError:
                return
            except OSError as error:
                if error.errno in (errno.EMFILE, errno.ENFILE):
                    self.out_of_descriptors(listener)
                    return
                continue                                    # the client is gone already (accept(2))
            self.welcome(sock, address, implicit)

    def out_of_descriptors(self, listener: socket.socket) -> None:
        """Give the last one up to take a client out of the queue, which would wake us for ever, and turn it away."""
        if self.spare >= 0:
            os.close(self.spare)
        try:
            sock, _ = listener.accept()
            with sock:
                sock.send(reply_bytes(421, "Too many clients, try again later"), socket.MSG_DONTWAIT)
        except OSError:
            pass
        try:
            self.spare = os.dup(self.channel.fileno())
        except OSError:
            self.spare = -1
        if not self.full:
            self.full = True
            self.log.error("Out of file descriptors: raise the limit (LimitNOFILE=, ulimit -n) or lower -c")

    def welcome(self, sock: socket.socket, address: "tuple[Any, ...]", implicit: bool = False) -> None:
        """Greet a new client, or turn it away."""
        host = address_normal(address[0])
        problem = self.objection(host)
        if problem:
            self.log.who = "?@" + host
            self.log.warning(problem)
            try:
                sock.send(reply_bytes(421, problem), socket.MSG_DONTWAIT)
            except OSError:
                pass
            sock.close()
            return
        try:
            sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            local = sock.getsockname()
        except OSError:
            local = ("", 0)
        visitor = Visitor(self, sock, Peer(host, address[1], address_scoped(local), local[1]), self.options, self.log)
        self.adopt(visitor)
        self.log.who = "?@" + host
        self.log.info("New connection from " + host)
        if implicit:
            visitor.negotiated.implicit = visitor.parked = True
            self.attend(visitor, self.start_handshake, visitor)
        else:
            self.attend(visitor, visitor.reply, 220, self.greeting.text(self.clients(), local[1]))

    def objection(self, host: str) -> str:
        """Why a client from `host` may not come in now; "" when it may."""
        if self.clients() >= self.options.maxclientsnumber:
            return "%d users (the maximum) are already logged in, sorry" % self.options.maxclientsnumber
        most = self.options.maxclientsperip
        if most and self.per_address.get(host, 0) >= most:
            return "Too many connections (%d) from this IP" % most
        if self.defender.banned(host, time.monotonic()) > 0:
            return "Too many wrong passwords came from this IP, try again later"
        return ""

    def clients(self) -> int:
        return len(self.visitors) + len(self.sessions)

    def adopt(self, visitor: Visitor) -> None:
        fd = visitor.sock.fileno()
        self.visitors[fd] = visitor
        self.since[fd] = time.monotonic()
        self.count(visitor.peer.address)
        self.selector.register(visitor.sock, selectors.EVENT_READ, self.on_visitor)

    def forget(self, visitor: Visitor) -> None:
        """The visitor is no longer ours: it left, or it has a process of its own now."""
        fd = visitor.sock.fileno()
        del self.visitors[fd], self.since[fd]
        self.set_events(visitor, 0)
        visitor.sock.close()

    def count(self, host: str) -> None:
        self.per_address[host] = self.per_address.get(host, 0) + 1

    def uncount(self, host: str) -> None:
        left = self.per_address.get(host, 1) - 1
        if left:
            self.per_address[host] = left
        else:
            self.per_address.pop(host, None)

    def hang_up(self, visitor: Visitor, end: Hangup) -> None:
        """Say what there is to say, and close."""
        if end.args:
            visitor.output += reply_bytes(*end.args)
        try:
            if visitor.output:
                visitor.sock.send(visitor.output, socket.MSG_DONTWAIT)
            # unread input would turn our goodbye into a reset
            visitor.sock.recv(VISITOR_READ, socket.MSG_DONTWAIT)
        except OSError:
            pass
        visitor.closing = True
        if self.checking.pop(visitor.id, None) is not None:
            self.defender.withdrawn(visitor.peer.address)
        self.uncount(visitor.peer.address)
        self.forget(visitor)

    def progress(self, visitor: Visitor) -> None:
        """Start the visitor's clock anew."""
        fd = visitor.sock.fileno()
        del self.since[fd]
        self.since[fd] = time.monotonic()

    # -- talking -------------------------------------------------------------------------------------

    def set_events(self, visitor: Visitor, events: int) -> None:
        """Wait for these events of the visitor's socket from now on."""
        key = self.selector.get_map().get(visitor.sock)
        if key is None:
            if events:
                self.selector.register(visitor.sock, events, self.on_visitor)
        elif not events:
            self.selector.unregister(visitor.sock)
        elif key.events != events:
            self.selector.modify(visitor.sock, events, self.on_visitor)

    def attend(self, visitor: Visitor, action: "Callable[..., Any]", *args: Any) -> None:
        """Do something for a visitor who is still there; what goes wrong ends this visitor, and nothing else."""
        if visitor.closing:
            return
        try:
            action(*args)
        except Hangup as end:
            self.hang_up(visitor, end)
        except OSError:
            self.hang_up(visitor, Hangup())
        except Exception:
            self.log.who = "?@" + visitor.host
            self.log.error("bug: " + traceback_text())
            self.hang_up(visitor, Hangup(421, "Something went wrong here, sorry"))

    def on_visitor(self, sock: socket.socket) -> None:
        """A visitor has sent something, or takes what we could not send."""
        visitor = self.visitors.get(sock.fileno())
        if visitor is not None:
            self.attend(visitor, self.hear, visitor)

    def hear(self, visitor: Visitor) -> None:
        if visitor.hello:
            self.start_handshake(visitor)
            return
        if visitor.output:
            self.flush(visitor)
        else:
            try:
                data = visitor.sock.recv(VISITOR_READ, socket.MSG_DONTWAIT)
            except BlockingIOError:
                return
            if not data:
                raise Hangup()
            visitor.input.feed(data)
        visitor.run_lines()

    def flush(self, visitor: Visitor) -> None:
        """Send what waits; what is not taken now waits for the socket."""
        try:
            count = visitor.sock.send(visitor.output, socket.MSG_DONTWAIT)
        except BlockingIOError:
            count = 0
        except OSError:
            raise Hangup() from None
        visitor.output = visitor.output[count:]
        if not visitor.parked:
            self.set_events(visitor, selectors.EVENT_WRITE if visitor.output else selectors.EVENT_READ)

    # -- logins --------------------------------------------------------------------------------------

    def begin_login(self, visitor: Visitor, user: bytes, password: bytes) -> None:
        """Have the credentials checked; on_verdict() goes on. Anonymous: both empty."""
        visitor.parked = True
        self.set_events(visitor, 0)
        now = time.monotonic()
        wait = self.defender.delay(visitor.peer.address, now) if user else 0.0
        if wait and self.defender.banned(visitor.peer.address, now):
            raise Hangup(*WRONG_LINE)
        if not wait:
            self.last_id += 1
            message = visitor.login_request(self.last_id, user, password)
            try:
                socket.send_fds(self.channel, [message], [visitor.sock.fileno()], socket.MSG_DONTWAIT)
                self.checking[visitor.id] = visitor
                wipe(message, password)
                return
            except OSError:
                wait = 0.05                                 # PRIV has its hands full, or there are too many sockets on the way
                if user:
                    self.defender.withdrawn(visitor.peer.address)
        self.at(now + wait, lambda: self.attend(visitor, self.begin_login, visitor, user, password))

    def start_tls(self, visitor: Visitor) -> Any:
        """Hand the client to a process of its own, which will do the handshake.

        What it sent with AUTH TLS must not count.
        """
        if visitor.input.pending():
            raise Hangup(503, "Commands after AUTH TLS must be encrypted")
        visitor.output += reply_bytes(234, "AUTH TLS OK")
        self.flush(visitor)
        if visitor.output:
            raise Hangup()
        self.start_handshake(visitor)

    def start_handshake(self, visitor: Visitor) -> None:
        """Hand the client over: at once after AUTH TLS, else (and with -3) when its ClientHello, and the name in it,
        has come.
        """
        if (self.options.extcert or visitor.negotiated.implicit) and not self.hello_seen(visitor):
            return
        self.last_id += 1
        try:
            socket.send_fds(self.channel, [starttls_message(self.last_id, visitor.negotiated)], [visitor.sock.fileno()],
                            socket.MSG_DONTWAIT)
        except OSError:
            raise Hangup() from None
        self.gone_on(visitor, self.last_id)

    def hello_seen(self, visitor: Visitor) -> bool:
        """Whether the ClientHello has come: then `negotiated.sni` is the name in it.

        Raises Hangup when none will come.
        """
        visitor.hello, before = max(visitor.hello, 1), visitor.hello
        visitor.parked = True
        try:
            data = visitor.sock.recv(HELLO_MAX, socket.MSG_PEEK | socket.MSG_DONTWAIT)
        except BlockingIOError:
            return False
        if len(data) < max(before, 1):                      # it is the connection's end that has woken us
            raise Hangup()
        name = hello_name(data)
        if name is None:                                    # wake us again when all of it is there
            visitor.hello = 5 + int.from_bytes(data[3:5], "big") if len(data) >= 5 else 5
        visitor.sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVLOWAT, visitor.hello if name is None else 1)
        visitor.negotiated.sni = name or b""
        return name is not None

    def gone_on(self, visitor: Visitor, number: int) -> None:
        """The client belongs to another process now; it counts till that ends."""
        self.sessions[number] = visitor.peer.address
        visitor.closing = visitor.parked = True
        self.forget(visitor)

    # -- PRIV ----------------------------------------------------------------------------------------

    def on_channel(self, channel: socket.socket) -> None:
        """A message from PRIV or a login child. Its end, or nonsense, is our end."""
        try:
            message, fds = message_receive(channel, 1)
            if not message:
                self.running = False
                return
            if fds and message[0] == NEWLOG:
                self.log.adopt(socket.socket(fileno=fds.pop()))
            for fd in fds:
                os.close(fd)
            handler = SERVER_MESSAGES.get(message[0])
            if handler is None:
                raise MessageError("unknown message %d" % message[0])
            handler(self, message)
        except BlockingIOError:
            pass
        except (MessageError, OSError) as error:
            self.log.who = ""
            self.log.error(f"SERVER cannot understand PRIV: {error}")
            self.running = False

    def on_verdict(self, message: bytes) -> None:
        _, number, verdict = numbered_parse(message)
        self.judged(number, verdict)

    def judged(self, number: int, verdict: int) -> None:
        """A login has been checked."""
        visitor = self.checking.pop(number, None)
        if visitor is None:
            if verdict == VERDICT_IN:
                self.sessions.setdefault(number, "")
            return
        host, now = visitor.peer.address, time.monotonic()
        if visitor.is_anonymous():
            pass                                            # no password was guessed
        elif verdict == VERDICT_WRONG:
            self.failed_login(host, now)
        else:
            self.defender.withdrawn(host)
        if verdict == VERDICT_IN:
            self.gone_on(visitor, number)
            return
        wait = visitor.refused(verdict)
        self.at(now + wait, lambda: self.attend(visitor, self.refused_now, visitor, verdict))

    def failed_login(self, host: str, now: float) -> None:
        _, banned = self.defender.failed(host, now)
        if banned:
            self.log.who = "?@" + host
            self.log.warning("Banned for %d seconds after %d wrong passwords" % (self.defender.ban_time, self.defender.ban_after))

    def refused_now(self, visitor: Visitor, verdict: int) -> None:
        self.progress(visitor)
        visitor.refused_now(verdict)
        if not visitor.parked:
            self.set_events(visitor, selectors.EVENT_WRITE if visitor.output else selectors.EVENT_READ)

    def on_ended(self, message: bytes) -> None:
        """A session is gone; or a login child died before it could tell anything."""
        _, number, _ = numbered_parse(message)
        if number in self.checking:
            self.judged(number, VERDICT_BROKEN)
        elif number in self.sessions:
            self.uncount(self.sessions.pop(number))

    def on_joined(self, message: bytes) -> None:
        """A client of the SERVER before us has a process of its own: it counts here now."""
        number, address = addressed_parse(message)
        if number not in self.sessions:
            self.sessions[number] = address
            self.count(address)

    def on_consult(self, message: bytes) -> None:
        """PRIV asks for a TLS client: its password may be checked when the defender says so."""
        number, address = addressed_parse(message)
        now = time.monotonic()
        wait = self.defender.delay(address, now)
        if wait and not self.defender.banned(address, now):
            self.at(now + wait, lambda: self.on_consult(message))
            return
        if not wait:
            self.consulted[number] = address
        try:
            self.channel.send(NUMBERED.pack(GRANTED, number, 1 if wait else 0), socket.MSG_DONTWAIT)
        except OSError:                                     # PRIV has its hands full: ask ourselves again
            if self.consulted.pop(number, None):
                self.defender.withdrawn(address)
            self.at(now + 0.05, lambda: self.on_consult(message))

    def on_outcome(self, message: bytes) -> None:
        _, number, verdict = numbered_parse(message)
        address = self.consulted.pop(number, None)
        if address is None:
            return
        if verdict == VERDICT_WRONG:
            self.failed_login(address, time.monotonic())
        else:
            self.defender.withdrawn(address)

    def on_newlog(self, message: bytes) -> None:
        """syslogd was started again; the descriptor that came with it has been taken."""
        plain_parse(message)

    def on_drain(self, message: bytes) -> None:
        """Another SERVER has taken over the listening sockets: stay for those who are here."""
        plain_parse(message)
        self.draining = True
        for listener in self.listeners:
            self.selector.unregister(listener.sock)
            listener.sock.close()
        self.listeners = []

    def on_stop(self, message: bytes) -> None:
        plain_parse(message)
        for visitor in list(self.visitors.values()):
            self.hang_up(visitor, Hangup(421, "The server is shutting down, goodbye"))
        self.running = False


SERVER_MESSAGES = {
    VERDICT: Server.on_verdict,
    ENDED: Server.on_ended,
    JOINED: Server.on_joined,
    CONSULT: Server.on_consult,
    OUTCOME: Server.on_outcome,
    DRAIN: Server.on_drain,
    NEWLOG: Server.on_newlog,
    STOP: Server.on_stop,
}

# ==== TLS certificates ============================================================================
# A client that says AUTH TLS gets a process of its own: it sits in the same cage as SERVER, does the handshake, goes
# on with the login as SERVER would, and afterwards passes the control connection on to the session, which sees a
# plain socket. So OpenSSL meets strangers in processes that hold nothing but one stranger's connection and the
# certificate's key.
#
# PRIV reads the files as root and keeps the SSLContext made from them until they change, so a renewed certificate
# serves the next client. What is each client's own are the keys of its session tickets: TLS process and session
# inherit them and put them into their copy of the context, so a data connection that resumes a TLS session resumes one
# of this very login; no other client's keys open it. Where Python gives no way to set them, each client gets a context
# made anew, whose keys OpenSSL has drawn: the same, but slower.
#
# No other process has the certificate's key: children drop the contexts that are not their client's, and what reading
# a file leaves in free memory (stdio's and OpenSSL's buffers) is overwritten before the next fork.
#
# Measured (8 clients at once): a context costs PRIV 0.75 ms of CPU, and every fork the release of all other clients'.

EXPIRY_DAYS = 14                    # a certificate that ends sooner is worth a line in the log
CERTIFICATE_MAX = 1 << 20           # bytes of a file
CONTEXTS_MAX = 16                   # certificates (host names) that are kept ready; others are read for each client
FRESH_SECONDS = 2                   # a file changed so recently may change once more without a trace in its times


class Certificates:
    """The certificate files, and what was good of them the last time. For PRIV, as root."""

    def __init__(self, options: Any, log: Log, before: "Certificates | None" = None) -> None:
        """`before`: those that these will replace. Raises ConfigError when they cannot be used now."""
        import ssl
        self.ssl, self.options, self.log = ssl, options, log
        self.libssl: "LibSSL | None" = before.libssl if before else libssl_load()
        # by paths, the last used last: (the files' state, what was made of them)
        self.contexts: "dict[tuple[str, str], tuple[Any, Any]]" = {}
        self.good: "dict[tuple[str, str], list[int]]" = {}      # by paths: memfds with what worked last
        self.complained: "set[tuple[str, str]]" = set()
        for paths, fds in (before.good.items() if before else ()):
            self.good[paths] = [os.dup(fd) for fd in fds]
        try:
            self.context_of(options.certfile)
            self.warn_of_expiry(options.certfile[0])
            self.look_through(options.extcert)
        except (OSError, ValueError) as error:
            self.close()
            made = "" if os.path.exists(options.certfile[0]) else "make one with --tlsselfsigned, or "
            raise ConfigError("-2 %s; %sgive the right file" % (certificate_reason(options.certfile, error), made)) from None
        except ConfigError:
            self.close()
            raise
        finally:
            memory_scrub()

    def of_client(self, name: bytes) -> ClientTls:
        """What a client gets that asked for host `name`.

        Raises OSError when there is no usable certificate.
        """
        host = self.of_host(name) if name and self.options.extcert else None
        context = self.context_ready(host) if host else None
        if context is None:
            context = self.context_ready(self.options.certfile)
        if context is None:
            raise OSError(errno.ENOENT, "there is no usable certificate")
        return ClientTls(context, os.urandom(TICKET_KEYS) if self.libssl else b"", self.libssl)

    def context_ready(self, paths: "tuple[str, str]") -> Any:
        """context_or_last(), made only when the files have changed and clients can share it."""
        if self.libssl is None:
            return self.context_or_last(paths)
        state = files_state(paths)
        known, context = self.contexts.pop(paths, (None, None))
        if state is None or state != known:
            context = self.context_or_last(paths) or context
        if context is not None:
            self.contexts[paths] = state, context
            if len(self.contexts) > CONTEXTS_MAX:
                del self.contexts[next(iter(self.contexts))]
        return context

    def context_or_last(self, paths: "tuple[str, str]") -> Any:
        """An SSLContext from these files, or from what they held when they were good; None when they never were."""
        try:
            context = self.context_of(paths)
            self.complained.discard(paths)
            return context
        except (OSError, ValueError) as error:
            if paths not in self.complained:
                self.complained.add(paths)
                remedy = "; the old one stays in use" if paths in self.good else ""
                self.log.error("certificate %s%s" % (certificate_reason(paths, error), remedy))
            return self.context_as_before(paths)
        finally:
            memory_scrub()

    def context_as_before(self, paths: "tuple[str, str]") -> Any:
        """An SSLContext from what these files held when they were good; None when that is not known."""
        if paths not in self.good:
            return None
        try:
            return tls_context(self.ssl, self.options, *("/proc/self/fd/%d" % fd for fd in self.good[paths]))
        except (OSError, ValueError):                       # no /proc here
            return None

    def of_host(self, name: bytes) -> "tuple[str, str] | None":
        """The file NAME.pem of the directory -3; it is looked up in its listing, so a client's name makes no path."""
        wanted = name.lower().decode("ascii", "replace") + ".pem"
        try:
            with os.scandir(self.options.extcert) as entries:
                return next(((entry.path, entry.path) for entry in entries if entry.name.lower() == wanted), None)
        except OSError:
            return None

    def context_of(self, paths: "tuple[str, str]") -> Any:
        """An SSLContext from these files, whose content is kept. Raises OSError, ValueError."""
        before = self.good.get(paths, [])
        if not hasattr(os, "memfd_create") or before and all(map(file_is, paths, before)):
            return tls_context(self.ssl, self.options, *paths)
        copies = [memory_copy(path) for path in paths]
        try:
            context = tls_context(self.ssl, self.options, *paths)
            if all(map(file_is, paths, copies)):            # what was read is what was copied
                self.good[paths], copies = copies, before
            return context
        finally:
            for fd in copies:
                os.close(fd)

    def close(self) -> None:
        """Forget what was good: another Certificates has taken over, or is to stay."""
        self.contexts.clear()
        for fds in self.good.values():
            for fd in fds:
                os.close(fd)
        self.good = {}

    def look_through(self, extcert: "str | None") -> None:
        """Tell of files of -3 in which there is no certificate, or one that ends soon. Raises ConfigError."""
        if not extcert:
            return
        try:
            names = sorted(name for name in os.listdir(extcert) if name.endswith(".pem"))
        except OSError as error:
            raise ConfigError(f"-3 {extcert}: {error.strerror}; give a directory with files HOST.pem") from None
        for name in names:
            path = os.path.join(extcert, name)
            try:
                if self.warn_of_expiry(path) is None:
                    self.log.error("certificate %s: there is no certificate in it" % path)
            except OSError as error:
                self.log.error("certificate %s: %s" % (path, error.strerror))

    def warn_of_expiry(self, path: str) -> "float | None":
        """When the certificate ends, in seconds since 1970; None when there is none. Raises OSError."""
        ends = certificate_end(self.ssl, pem_text(path))
        if ends is not None and ends - time.time() < EXPIRY_DAYS * 86400:
            self.log.warning("The certificate %s %s %s" % (
                path, "ends" if ends > time.time() else "has ended",
                time.strftime("on %Y-%m-%d at %H:%M UTC", time.gmtime(ends))))
        return ends


def pem_text(path: str) -> str:
    """What a file says, which should be PEM. Raises OSError."""
    with open(path, encoding="ascii", errors="replace") as file:
        return file.read(CERTIFICATE_MAX)


def certificate_reason(paths: "tuple[str, str]", error: Exception) -> str:
    """Why these two files (or one twice) cannot be used, where OpenSSL leaves it at "PEM lib"."""
    for path, kind in zip(paths, ("CERTIFICATE", "PRIVATE KEY")):
        try:
            text = pem_text(path)
        except OSError as problem:
            return f"{path}: {problem.strerror}"
        if kind + "-----" not in text:
            return f"{path}: there is no {kind.lower()} in it"
        if kind == "PRIVATE KEY" and "ENCRYPTED" in text:
            return f"{path}: the key has a passphrase, which nobody is asked for: remove it with openssl pkey"
    return f"{paths[0]}: {tls_reason(error)}"


def files_state(paths: "tuple[str, ...]") -> Any:
    """What changes whenever one of the files does; None for what may have changed, or may yet, without that."""
    try:
        found = [os.stat(path) for path in paths]
    except OSError:
        return None
    if abs(time.time() - max(entry.st_ctime for entry in found)) < FRESH_SECONDS:
        return None
    return [(entry.st_dev, entry.st_ino, entry.st_size, entry.st_mtime_ns, entry.st_ctime_ns) for entry in found]


def memory_copy(path: str) -> int:
    """A memfd with the content of a file. Raises OSError."""
    with open(path, "rb") as file:
        data = file.read(CERTIFICATE_MAX)
    fd = os.memfd_create("certificate", os.MFD_CLOEXEC)
    os.write(fd, data)
    return fd


def file_is(path: str, fd: int) -> bool:
    """Whether the file still has the content that `fd` keeps."""
    with open(path, "rb") as file:
        return file.read(CERTIFICATE_MAX) == os.pread(fd, CERTIFICATE_MAX, 0)


def tls_context(ssl: Any, options: Any, certificate: str, key: str) -> Any:
    """An SSLContext of the server's side. Raises OSError (ssl.SSLError is one), ValueError; ConfigError for -J."""
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    lowest_version(ssl, context, options.tlsminversion)
    context.load_cert_chain(certificate, key, password=lambda: "")      # a key with a passphrase fails, it never asks
    context.set_alpn_protocols(["ftp"])
    context.options |= ssl.OP_NO_COMPRESSION | getattr(ssl, "OP_NO_RENEGOTIATION", 0)
    # Python 3.9 to 3.11 set it: uploads cut off would pass
    context.options &= ~getattr(ssl, "OP_IGNORE_UNEXPECTED_EOF", 0x80)
    ciphers = options.tlsciphersuite or ("DEFAULT:@SECLEVEL=0" if options.tlsminversion < "1.2" else "")
    while ciphers[:3] in ("-C:", "-S:"):
        if ciphers[:3] == "-C:":                        # Compat: clients must show a certificate that ours vouches for
            context.verify_mode = ssl.CERT_REQUIRED
            context.load_verify_locations(certificate)
        ciphers = ciphers[3:]
    if ciphers:
        try:
            context.set_ciphers(ciphers)
        except ssl.SSLError:
            raise ConfigError(f"-J {ciphers}: no cipher that OpenSSL knows; try HIGH (see openssl ciphers -v)") from None
    return context


def lowest_version(ssl: Any, context: Any, version: str) -> None:
    """--tlsminversion. Python warns of 1.0 and 1.1, but an administrator who asks for them has been warned."""
    import warnings
    names = {"1.0": "TLSv1", "1.1": "TLSv1_1", "1.2": "TLSv1_2", "1.3": "TLSv1_3"}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)
        context.minimum_version = getattr(ssl.TLSVersion, names[version])


def certificate_end(ssl: Any, pem: str) -> "float | None":
    """When the first certificate in `pem` ends, in seconds since 1970; None when that cannot be read (RFC 5280, 4.1).
    """
    start = pem.find("-----BEGIN CERTIFICATE-----")
    end = pem.find("-----END CERTIFICATE-----", start)
    try:
        der = ssl.PEM_cert_to_DER_cert(pem[start:end] + "-----END CERTIFICATE-----\n")
        body = der_items(der_items(der_items(der)[0][1])[0][1])         # Certificate, TBSCertificate
        fields = body[1:] if body[0][0] == 0xA0 else body               # the version is optional
        kind, text = der_items(fields[3][1])[1]                         # Validity: notBefore, notAfter
        century = b"" if kind == 24 else b"20" if text[:1] < b"5" else b"19"
        return stamp_parse(century + text.rstrip(b"Z"))
    except (ValueError, IndexError):
        return None


def der_items(data: bytes) -> "list[tuple[int, bytes]]":
    """(tag, content) of each item in DER. Raises IndexError for what is cut off."""
    items, at = [], 0
    while at < len(data):
        tag, length, at = data[at], data[at + 1], at + 2
        if length & 128:
            count = length & 127
            length, at = int.from_bytes(data[at:at + count], "big"), at + count
        items.append((tag, data[at:at + length]))
        at += length
    return items


def certificate_make(options: Any, log: Log) -> None:
    """--tlsselfsigned: a self-signed certificate where there is none, for the key that may be there already.

    Raises ConfigError.
    """
    import subprocess
    certificate, key = options.certfile
    if os.path.exists(certificate):
        return
    host = socket.gethostname() or "localhost"
    own_key = ["-key", key] if os.path.exists(key) else [
        "-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:prime256v1", "-nodes", "-keyout", key + ".new"]
    mask = os.umask(0o077)
    try:
        os.makedirs(os.path.dirname(os.path.abspath(certificate)), 0o755, exist_ok=True)
        made = subprocess.run(["openssl", "req", "-x509", *own_key, "-days", "3650", "-subj", "/CN=" + host[:64],
                               "-addext", "subjectAltName=DNS:" + host, "-out", certificate + ".crt"],
                              stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, check=False)
        if made.returncode:
            raise ConfigError("--tlsselfsigned: openssl failed: " + made.stderr.decode("utf-8", "replace").strip()[-200:])
        for path in (certificate + ".crt", *([] if "-key" in own_key else [key + ".new"])):
            if not os.path.getsize(path):               # openssl(1) does not say so
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        if key == certificate:                          # both in one file, which appears when it is complete
            with open(key + ".new", "ab") as file, open(certificate + ".crt", "rb") as fresh:
                file.write(fresh.read())
            os.unlink(certificate + ".crt")
        else:
            os.rename(certificate + ".crt", certificate)
        if os.path.exists(key + ".new"):
            os.rename(key + ".new", key)
    except FileNotFoundError:
        raise ConfigError("--tlsselfsigned: there is no openssl(1) here: install it, or give a certificate with -2") from None
    except OSError as error:
        raise ConfigError(f"--tlsselfsigned: {certificate}: {error.strerror}") from None
    finally:
        os.umask(mask)
    log.warning(f"Made a self-signed certificate for {host}: {certificate}. Clients will ask whether to trust it")

# ==== TLS process: one client's handshake, login and relay ========================================
# What SERVER is for everybody, TlsDoor is for the one client that said AUTH TLS: its Visitor asks it for the same
# things. After the login it is the relay: what OpenSSL decrypts goes to the session's socket and back. It ends when
# the session does.
#
# CCC (RFC 4217 section 12.3) is told by the session with a descriptor beside the reply that is the last one under
# TLS.

RELAY_READ = 65536                  # bytes


class TlsDoor:
    """One client of a TLS process."""

    def __init__(self, options: Any, log: Log, sock: socket.socket, channel: socket.socket, tls: ClientTls,
                 negotiated: Negotiated, peer: Peer, greeting: "Greeting | None" = None) -> None:
        """`greeting`: of a client that began with TLS; who said AUTH TLS has been greeted."""
        import ssl
        self.ssl, self.options, self.log, self.channel, self.greeting = ssl, options, log, channel, greeting
        self.libssl, context = tls.libssl, tls.context
        sock.setblocking(False)
        channel.setblocking(False)
        context.sni_callback = self.on_name
        self.sock: Any = context.wrap_socket(sock, server_side=True, do_handshake_on_connect=False, suppress_ragged_eofs=False)
        self.encrypted = True
        self.visitor = Visitor(self, self.sock, peer._replace(encrypted=True), options, log, negotiated)
        self.poller = select.poll()
        self.poller.register(self.sock, select.POLLIN)
        self.poller.register(channel, select.POLLIN)
        self.relay: "socket.socket | None" = None           # our end of what becomes the session's control connection
        self.admitted = False
        self.ticket_giver: "LibSSL | None" = None           # of one more ticket after each transfer
        self.transfer = False                               # whether one goes on
        self.unsent = b""                                   # what the session does not take now
        self.last_id = 0
        self.since = time.monotonic()
        self.timer: "tuple[float, Callable[[], None]] | None" = None

    def run(self) -> None:
        try:
            self.handshake()
            if self.greeting is not None:
                self.visitor.reply(220, self.greeting.text(0, self.visitor.peer.local_port))
            while not self.admitted:
                self.round()
            self.pass_on()
        except Hangup as end:
            self.goodbye(end)

    # -- OpenSSL -------------------------------------------------------------------------------------

    def patiently(self, action: "Callable[..., Any]", *args: Any, seconds: float) -> Any:
        """action(*args), again whenever OpenSSL has to read or write first. Raises Hangup when that takes too long."""
        deadline = time.monotonic() + seconds
        while True:
            try:
                return action(*args)
            except self.ssl.SSLWantReadError:
                self.wait_for(select.POLLIN, deadline)
            except self.ssl.SSLWantWriteError:
                self.wait_for(select.POLLOUT, deadline)

    def wait_for(self, events: int, deadline: float) -> None:
        poller = select.poll()
        poller.register(self.sock, events)
        if not poller.poll(max(0, deadline - time.monotonic()) * 1000):
            raise Hangup()

    def handshake(self) -> None:
        try:
            self.patiently(self.sock.do_handshake, seconds=HANDSHAKE_SECONDS)
        except (OSError, ValueError) as error:
            self.log.warning("TLS handshake failed: " + tls_reason(error))
            raise Hangup() from None
        self.log.info("TLS: %s with %s" % (self.sock.version(), (self.sock.cipher() or ("?",))[0]))

    def on_name(self, _: Any, name: "str | None", __: Any) -> None:
        """The host name that the client asks for in its handshake, for back ends that want to know it."""
        wanted = (name or "").lower().encode("ascii", "replace")
        if len(wanted) <= SNI_MAX and NAME_IN_CERTIFICATES.issuperset(wanted):
            self.visitor.negotiated.sni = wanted

    def receive(self, most: int) -> "bytes | None":
        """What the client has sent; None for nothing yet. Raises Hangup at its end."""
        try:
            data = self.sock.recv(most)
        except (self.ssl.SSLWantReadError, self.ssl.SSLWantWriteError, BlockingIOError):
            return None
        except OSError:
            data = b""
        if not data:
            raise Hangup()
        return data

    def send(self, data: bytes) -> None:
        """Send all of it. Raises Hangup when the client does not take it."""
        view = memoryview(data)
        try:
            while view:
                view = view[self.patiently(self.sock.send, view, seconds=SEND_SECONDS):]
        except BlockingIOError:                             # in the clear, after CCC
            self.wait_for(select.POLLOUT, time.monotonic() + SEND_SECONDS)
            self.send(bytes(view))
        except OSError:
            raise Hangup() from None

    def goodbye(self, end: Hangup) -> None:
        """Say what there is to say, then close_notify, and wait a little for the client's."""
        try:
            if end.args:
                self.send(reply_bytes(*end.args))
            if self.encrypted:
                self.patiently(self.sock.unwrap, seconds=GOODBYE_SECONDS)
        except (Hangup, OSError, ValueError):
            pass                                            # it is gone already
        self.sock.close()

    # -- what the visitor asks of its door -----------------------------------------------------------

    def flush(self, visitor: Visitor) -> None:
        output, visitor.output = visitor.output, b""
        self.send(output)

    def progress(self, visitor: Visitor) -> None:
        self.since = time.monotonic()

    def begin_login(self, visitor: Visitor, user: bytes, password: bytes) -> None:
        """Have the credentials checked; the session will get the other end of the relay."""
        self.last_id += 1
        if self.relay is not None:
            self.relay.close()
        self.relay, theirs = socket.socketpair()
        self.hand_session_over(self.relay)
        message = visitor.login_request(self.last_id, user, password)
        with theirs:
            try:
                socket.send_fds(self.channel, [message], [theirs.fileno()])
            except OSError:
                raise Hangup(*LOGIN_LINES[VERDICT_BROKEN]) from None
            finally:
                wipe(message, password)

    def hand_session_over(self, relay: socket.socket) -> None:
        """Tell the user's process, before all else, of the session that clients without tickets resume by its id."""
        data = self.libssl.session_export(self.sock) if self.libssl and self.sock.version() != "TLSv1.3" else b""
        relay.send(HANDOVER.pack(len(data)) + data)

    # -- before the login ----------------------------------------------------------------------------

    def round(self) -> None:
        """Wait for something and do what it asks for."""
        for fd, events in self.poller.poll(self.milliseconds()):
            if fd == self.channel.fileno():
                self.on_channel()
            elif not self.visitor.parked:
                self.listen()
            elif events & (select.POLLHUP | select.POLLERR):
                raise Hangup()                              # it has gone, whatever becomes of its login
        now = time.monotonic()
        if self.timer is not None and now >= self.timer[0]:
            action, self.timer = self.timer[1], None
            action()
        elif not self.visitor.parked and now >= self.since + LOGIN_SECONDS:
            raise Hangup(421, "Timeout: nobody logged in, goodbye")
        self.poller.modify(self.sock, 0 if self.visitor.parked else select.POLLIN)

    def milliseconds(self) -> "float | None":
        """Till something is due; None: a login is being checked, which ends by itself."""
        if self.timer is None and self.visitor.parked:
            return None
        due = self.since + LOGIN_SECONDS if self.timer is None else self.timer[0]
        return max(0.0, due - time.monotonic()) * 1000 + 1

    def listen(self) -> None:
        """Run what the client has sent: all that OpenSSL holds of it, which the kernel does not tell of."""
        data = self.receive(VISITOR_READ)
        while data is not None:
            self.visitor.input.feed(data)
            self.visitor.run_lines()
            data = None if self.visitor.parked else self.receive(VISITOR_READ)

    def on_channel(self) -> None:
        """The verdict on a login, or the server's end."""
        try:
            message = self.channel.recv(MESSAGE_MAX)
        except OSError:
            message = b""
        try:
            if not message or message[0] == STOP:
                raise Hangup(421, "The server is shutting down, goodbye")
            kind, number, verdict = numbered_parse(message)
        except MessageError as error:
            self.log.error("TLS cannot understand PRIV: %s" % error)
            raise Hangup() from None
        if number != self.last_id or not self.visitor.parked or self.timer is not None:
            return
        if kind == VERDICT and verdict == VERDICT_IN:
            self.admitted = True
        elif kind in (VERDICT, ENDED):
            verdict = verdict if kind == VERDICT else VERDICT_BROKEN
            self.timer = time.monotonic() + self.visitor.refused(verdict), lambda: self.refused_now(verdict)

    def refused_now(self, verdict: int) -> None:
        self.progress(self.visitor)
        self.visitor.refused_now(verdict)
        if not self.visitor.parked:
            self.listen()

    # -- after it ------------------------------------------------------------------------------------

    def pass_on(self) -> None:
        """Relay between the client and the session, until the session ends."""
        assert self.relay is not None
        relay = self.relay
        relay.setblocking(False)
        if self.options.tlssessionreuse != "off" and self.sock.version() == "TLSv1.3":
            self.ticket_giver = self.libssl
        process_title("pure-ftpd (TLS relay)")
        self.poller = select.poll()
        self.poller.register(relay, select.POLLIN)
        # OpenSSL may have more of a record that began before the login
        self.from_client(relay)
        while True:
            for fd, events in self.poller.poll():
                if fd != relay.fileno() or events == select.POLLOUT:
                    self.from_client(relay)
                else:
                    self.from_session(relay)

    def from_client(self, relay: socket.socket) -> None:
        """Pass on what the client says. While the session does not take it, the client has to wait; the session's replies
        do not.
        """
        try:
            while True:
                self.unsent = self.unsent or self.receive(RELAY_READ) or b""
                if not self.unsent:
                    self.poller.register(relay, select.POLLIN)
                    self.poller.register(self.sock, select.POLLIN)
                    return
                self.unsent = self.unsent[relay.send(self.unsent):]
        except BlockingIOError:
            self.poller.register(relay, select.POLLIN | select.POLLOUT)
            self.listen_no_more()
        except (Hangup, OSError):                           # the session finds out, and may have more to say
            self.poller.register(relay, select.POLLIN)
            self.listen_no_more()
            try:
                relay.shutdown(socket.SHUT_WR)
            except OSError:
                pass

    def listen_no_more(self) -> None:
        try:
            self.poller.unregister(self.sock)
        except KeyError:
            pass                                            # we do not listen to it

    def from_session(self, relay: socket.socket) -> None:
        try:
            data, fds, _, _ = socket.recv_fds(relay, RELAY_READ, 1)
        except OSError:                                     # it died with something unread
            raise Hangup() from None
        for fd in fds:
            os.close(fd)
        if not data:
            raise Hangup()
        if self.ticket_giver is not None and self.transfer_ended(data):
            self.ticket_giver.ticket_promise(self.sock)
        self.send(data)
        if fds:
            self.clear_command_channel()

    def transfer_ended(self, replies: bytes) -> bool:
        """Whether these are the first replies after a 150, whatever they say: the client has spent a ticket."""
        begun = self.transfer or replies.startswith(b"150") or b"\n150" in replies
        last = replies[replies.rstrip().rfind(b"\n") + 1:]
        self.transfer = begun and last.startswith(b"150")
        return begun and not self.transfer

    def clear_command_channel(self) -> None:
        try:
            self.sock = self.patiently(self.sock.unwrap, seconds=GOODBYE_SECONDS)
        except (OSError, ValueError):
            raise Hangup() from None
        self.encrypted, self.ticket_giver = False, None

# ==== Privilege separation: everything that may run as root =======================================
# Please read this section with suspicion. The processes, and what each may be asked:
#
# process     uid                       root directory   reads of clients        answers (to whom)
# (PRIV)      0 saved, at rest euid     /                nothing                 LOGIN, STARTTLS, GRANTED (SERVER), LOGIN (TLS),
#             _pure-ftpd                                                         ADMITTED, BINDRESPORT, REMOVEFTPWHOENTRY,
#                                                                                REOPENLOG (session)
# (SERVER)    _pure-ftpd for good       an empty one     all of visitors         VERDICT, ENDED, JOINED, CONSULT, OUTCOME, DRAIN,
#                                                                                NEWLOG, STOP (PRIV)
# (TLS)       _pure-ftpd for good       an empty one     all of its client       VERDICT, ENDED, STOP (PRIV)
# (LOGIN)     0 till it is (IDLE)       /                one name, one password  nothing
# (IDLE) ...  the user for good         the user's home  all of its client       STOP (PRIV)
#
# PRIV is asked in messages of fixed size, in which no client has a say but in LOGIN, whose variable part it passes on
# unread. What it does as root are the root_* functions below, SIGHUP's reading of the configuration, and a client's
# certificate. A test lists who changes uids, groups and root directories: at the start privsep_check() and privsep_init(),
# PRIV privsep_priv_user() and privsep_unpriv_user(), for good user_for_good() (become(), tool_become()) and confine(), and
# quotacheck's own chroot. Where the kernel refuses, the process ends; confine() alone says so, and paths are walked then.
#
# Without root the same processes run under one uid; nothing is raised or dropped, and trees are walked (see Tree).

PRIVSEP_USERS = ("_pure-ftpd", "pure-ftpd", "nobody")
DATA_PORTS = (20, 2, 3, 4, 5, 6, 10, 14, 16, 0)     # source ports of active connections, as the original's list; 0: any
LOGIN_CHECKS = 16                   # credentials that are checked at once; more logins wait in line
LOGIN_CHECK_SECONDS = 60            # a check that takes longer is ended (a back end hangs)
LOGIN_EXIT = 10                     # exit status of a login child that let nobody in: this and the VERDICT_*
SERVER_RESTART_SECONDS = 1.0        # a SERVER that dies is started again, not more often than this
UNSENT_MAX = 4096                   # messages that may wait for SERVER to read
UNSENT_SECONDS = 0.05               # after which a message is tried again for which a channel had no room
KILLS_MAX = 5                       # how often, a second apart, those are killed that do not end with the server
SERVER_QUICK_ENDS = 5               # that often in a row at once: it cannot run here
NAME_SECONDS = 2                    # for all that a login asks the name service


class Privileges(NamedTuple):
    """Whom the unprivileged processes run as."""
    root: bool                          # whether there is anything to drop
    uid: int
    gid: int
    name: str


class Overcrowded(Exception):
    """The account has as many sessions as it may have."""


def privsep_account() -> Privileges:
    """The account of PRIV at rest, SERVER and TLS: the first of PRIVSEP_USERS that exists; ourselves without root."""
    import pwd
    if os.geteuid():
        return Privileges(False, os.geteuid(), os.getegid(), "")
    for name in PRIVSEP_USERS:
        try:
            entry = pwd.getpwnam(name)
        except KeyError:
            continue
        if entry.pw_uid and entry.pw_gid:
            return Privileges(True, entry.pw_uid, entry.pw_gid, name)
    raise ConfigError("there is no user to run as: create one called _pure-ftpd (useradd --system _pure-ftpd)")


def die(what: str) -> None:
    """End this process, which does not have the privileges it must have."""
    try:
        os.write(2, ("pure-ftpd: %s: ending this process\n" % what).encode())
    finally:
        os._exit(70)


def privsep_priv_user(privileges: Privileges) -> None:
    """PRIV is root from here on, for a few system calls."""
    if privileges.root:
        try:
            os.seteuid(0)
        except OSError:
            die("cannot become root again")


def privsep_unpriv_user(privileges: Privileges) -> None:
    """PRIV is the privsep user again."""
    if privileges.root:
        try:
            os.seteuid(privileges.uid)
        except OSError:
            pass
        if os.geteuid() != privileges.uid:
            die("cannot drop root")


def privsep_check(privileges: Privileges) -> None:
    """Raise ConfigError where root may not become anybody else (a container without the capabilities)."""
    if privileges.root:
        try:
            os.seteuid(privileges.uid)
            os.seteuid(0)
        except OSError as error:
            raise ConfigError("root cannot become %s here (%s): give the container the capabilities SETUID, SETGID and "
                              "SYS_CHROOT, or start as an ordinary user" % (privileges.name, error.strerror)) from None


class as_root:
    """`with as_root(privileges):` between privsep_priv_user() and privsep_unpriv_user().

    Nothing that is long belongs inside.
    """

    def __init__(self, privileges: Privileges) -> None:
        self.privileges = privileges

    def __enter__(self) -> None:
        privsep_priv_user(self.privileges)

    def __exit__(self, *_: object) -> None:
        privsep_unpriv_user(self.privileges)


def user_for_good(uid: int, gid: int, groups: "tuple[int, ...]") -> None:
    """Be that user for good: groups, gid, uid, then the proof that there is no way back. Raises OSError."""
    if uid == 0 or gid == 0:
        raise OSError(errno.EPERM, "refusing to run as root")
    os.setgroups(groups)
    if hasattr(os, "setresuid"):
        os.setresgid(gid, gid, gid)
        os.setresuid(uid, uid, uid)
        right = os.getresuid() == (uid,) * 3 and os.getresgid() == (gid,) * 3
    else:                                               # macOS: for root these change all three
        os.setgid(gid)
        os.setuid(uid)
        right = (os.getuid(), os.geteuid(), os.getgid(), os.getegid()) == (uid, uid, gid, gid)
    if not right:
        raise OSError(errno.EPERM, "not the user that was asked for")
    for regain in (lambda: os.setuid(0), lambda: os.setgid(0), lambda: os.setgroups([0])):
        try:
            regain()
        except PermissionError:
            continue
        raise OSError(errno.EPERM, "root could be regained")


def become(uid: int, gid: int, groups: "tuple[int, ...]") -> None:
    """user_for_good(), which ends the process when anything fails."""
    try:
        user_for_good(uid, gid, groups)
    except OSError as error:
        die("cannot become uid %d, gid %d: %s" % (uid, gid, error.strerror))


def tool_identity(uid: "int | None", gid: "int | None") -> "tuple[int, int] | None":
    """Whom the -u and -g of uploadscript and authd name; None: nobody else. Raises ConfigError.

    Compat: without -g the group is that of the user's account, where the original takes root's.
    """
    if uid is None and gid is None:
        return None
    if os.geteuid():
        raise ConfigError("-u and -g: only root can become somebody else")
    if uid and gid is None:
        import pwd
        try:
            gid = pwd.getpwuid(uid).pw_gid
        except KeyError:
            raise ConfigError(f"-u {uid}: there is no such account; give its group, too, with -g") from None
    return uid or 0, gid or 0


def tool_become(uid: int, gid: int) -> None:
    """Be whom tool_identity() found. Without -u a tool stays root, as the original's, in the group of -g.

    Raises OSError.
    """
    if uid:
        user_for_good(uid, gid, (gid,))
    else:
        os.setgroups([gid])
        os.setgid(gid)


def confine(directory: "int | bytes") -> bool:
    """chroot(2) into a directory (path or descriptor) and stand at its top; False where that is forbidden (some
    containers).
    """
    os.chdir(directory)
    try:
        os.chroot(".")
    except PermissionError:
        return False
    os.chdir("/")
    return True


def give_up_for_all(log: Log) -> None:
    """For PRIV, and so for all its children: no core files, and nothing to gain by execve(2)."""
    import resource
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    if not no_new_privs():
        log.notice("The kernel does not offer no_new_privs")


def cage(privileges: Privileges, empty: bytes, log: Log) -> None:
    """SERVER and TLS: the privsep user for good, in an empty directory (or where no file can be touched), unable to
    fork.
    """
    import resource
    missing = []
    statedir_empty(os.fsdecode(os.path.dirname(empty)))
    if privileges.root:
        if not confine(empty):
            missing.append("chroot")
        become(privileges.uid, privileges.gid, (privileges.gid,))
    if not privileges.root or missing:
        missing += [] if landlock_confine(None) else ["Landlock"]
    resource.setrlimit(resource.RLIMIT_NPROC, (0, 0))
    if missing:
        log.notice("The kernel does not offer %s to the unprivileged processes" % " and ".join(missing))


def close_others(keep: "list[int]") -> None:
    """Close every descriptor but 0, 1, 2 and `keep`.

    Python 3.9 tries each number up to the limit, which may be a million: there /proc tells which are open.
    """
    import resource
    if sys.version_info < (3, 10):
        try:
            present = [int(name) for name in os.listdir("/proc/self/fd")]
        except OSError:                                     # no /proc, or no descriptor left to list it with
            pass
        else:
            for fd in present:
                if fd > 2 and fd not in keep:
                    os.closerange(fd, fd + 1)
            return
    last = 2
    for fd in sorted(keep):
        os.closerange(last + 1, fd)
        last = max(last, fd)
    os.closerange(last + 1, min(resource.getrlimit(resource.RLIMIT_NOFILE)[0], 1 << 20))


# ---- what PRIV does as root ----------------------------------------------------------------------


def root_bind_data_port(privileges: Privileges, local: str, family: int) -> "socket.socket | None":
    """A socket bound to port 20 of the control connection's own address, else to the next of DATA_PORTS.

    A hostile session chooses the family only, and gains a socket that can listen on a low port that nobody uses.
    """
    host = local if (":" in local) == (family == socket.AF_INET6) else ""
    with as_root(privileges):
        for port in DATA_PORTS:
            sock = socket.socket(family, socket.SOCK_STREAM)
            try:
                sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
                sock.bind(address_to_bind(host, port))
                return sock
            except OSError:
                sock.close()
    return None


def root_open_log(privileges: Privileges, path: str) -> "int | None":
    """A transfer log, to append to. A hostile session gains what it has already: the path is the administrator's."""
    with as_root(privileges):
        try:
            return transferlog_open(path)
        except OSError:
            return None


def root_scoreboard_remove(privileges: Privileges, statedir: str, pid: int) -> None:
    """Remove the entry of a session. The pid is PRIV's own record, not what anybody says."""
    with as_root(privileges):
        try:
            scoreboard_remove(statedir, pid)
        except OSError:
            pass


def root_kill(privileges: Privileges, pid: int) -> None:
    """End a child of ours that has not been waited for, so the pid cannot be another process."""
    with as_root(privileges):
        try:
            os.kill(pid, signal.SIGKILL)
        except (ProcessLookupError, PermissionError):       # it has ended; or there is no CAP_KILL in this container
            pass


# ---- the login child: root till it is the user ---------------------------------------------------


class Home(NamedTuple):
    """Where an account lives on this machine."""
    root: bytes                         # what becomes its /; b"/" when it is not locked in
    start: bytes                        # seen from there
    locked: bool
    trusted: bool


def home_of(options: Any, account: Account) -> Home:
    """pure-ftpd(8), -A, -a and `/./`: who is locked into which directory. A quota locks in, too."""
    trusted = options.trustedgid is not None and options.trustedgid in (account.groups or (account.gid,))
    top, dot, below = account.home.partition(b"/./")
    if dot or account.home.endswith(b"/."):
        return Home((top if dot else account.home[:-2]) or b"/", b"/" + below, True, trusted)
    quota = quota_limits(options, account, trusted) != (None, None)
    if account.anonymous or options.chrooteveryone or quota or options.trustedgid is not None and not trusted:
        return Home(account.home, b"/", True, trusted)
    return Home(b"/", account.home, False, trusted)


def home_make(home: Home, account: Account, options: Any) -> None:
    """-j: make a home that is missing, its parents 0755 and root's, itself the user's. Raises OSError."""
    path = home.root.rstrip(b"/") + home.start if home.locked else home.start
    if os.path.isdir(path):
        return
    *parents, name = filter(None, path.split(b"/"))
    directory = os.open(b"/", os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        for parent in parents:
            outer, directory = directory, directory_enter(directory, parent)
            os.close(outer)
        os.mkdir(name, 0o700, dir_fd=directory)
        fd = os.open(name, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC, dir_fd=directory)
    finally:
        os.close(directory)
    try:
        if not os.geteuid():
            os.fchown(fd, account.uid, account.gid)
        os.fchmod(fd, 0o777 & ~options.umask[1])
    finally:
        os.close(fd)


def directory_enter(outer: int, name: bytes) -> int:
    """A descriptor of a directory in another one, made if there is none, then in group 0. OSError.

    A link is followed where nobody but root (or ourselves) could have made it: users own directories above others' homes.
    """
    try:
        os.mkdir(name, 0o755, dir_fd=outer)
    except FileExistsError:
        st = os.fstat(outer)
        ours = st.st_uid in (0, os.geteuid()) and not st.st_mode & 0o022
        return os.open(name, DIRECTORY_ONLY & ~os.O_NOFOLLOW if ours else DIRECTORY_ONLY, dir_fd=outer)
    fd = os.open(name, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC, dir_fd=outer)
    if not os.geteuid() and os.fstat(fd).st_gid == os.getegid():
        os.fchown(fd, 0, 0)
    return fd


def unprivileged_answer(privileges: Privileges, question: "Callable[[], Any]") -> bytes:
    """What `question` yields within NAME_SECONDS, 4096 bytes and a little at most, in a process of its own that is nobody and
    holds nothing: name servers are strangers, too.
    """
    reader, writer = os.pipe()
    pid = os.fork()
    if not pid:
        try:
            signal.alarm(NAME_SECONDS)
            close_others([writer])                      # the channels of others above all
            if privileges.root:
                become(privileges.uid, privileges.gid, (privileges.gid,))
            for piece in question():
                os.write(writer, piece)
        finally:
            os._exit(0)
    os.close(writer)
    answer = b""
    while len(answer) < 4096 and (piece := os.read(reader, 4096)):
        answer += piece
    os.close(reader)
    os.waitpid(pid, 0)
    return answer


def names_of_network(names: "list[str]", address: "str | None") -> Any:
    """Ask the name service: yields a line with the IPv4 address of each of `names`, empty for none, then `address`'s name."""
    for name in names:
        try:
            yield b"%s\n" % str(socket.getaddrinfo(name.encode(), None, socket.AF_INET)[0][4][0]).encode("ascii")
        except OSError:
            yield b"\n"
    if address is not None:
        try:
            yield socket.getnameinfo((address, 0), socket.NI_NAMEREQD)[0].encode("ascii", "replace")
        except OSError:
            pass


class Setup(NamedTuple):
    """What the daemon has prepared for its children."""
    options: Any
    log: Log
    privileges: Privileges
    statedir: str
    empty: bytes                        # the directory SERVER and TLS are caged in
    aliases: "dict[bytes, bytes]"
    greeting: Greeting
    certificates: "Certificates | None" # with -Y
    own: "OwnFiles | None"              # without root: the server's own files
    anonymous_root: bytes               # without root: what anonymous users get


class Check(NamedTuple):
    """A login that waits for its child, or has it."""
    number: int
    message: bytes                      # LOGIN, unread
    client: int                         # descriptor
    peer: Peer
    asker: socket.socket                # PRIV's end of the channel of SERVER or TLS: where VERDICT goes
    tls: "ClientTls | None"             # None in the clear
    consultation: int = 0               # SERVER's permission, for a client behind a TLS process


def login_account(setup: Setup, request: LoginRequest, peer: Peer) -> Account:
    """Whose credentials these are. As root. Raises Refused, BackendBroken."""
    if not request.user:
        if setup.options.noanonymous:
            raise Refused("anonymous users are not let in (-E)")
        return anonymous_account(setup.options, peer, setup.anonymous_root)
    if setup.options.anonymousonly:
        raise Refused("only anonymous users are let in (-e)")
    account = authenticate(setup.options, request.user, request.password, peer, setup.log)
    if not setup.privileges.root:
        account = account._replace(uid=os.geteuid(), gid=os.getegid(), groups=tuple(os.getgroups()))
    return account


def login_child(setup: Setup, check: Check, channel: socket.socket) -> None:
    """A forked child of PRIV: check the credentials as root, become the user, and serve the session."""
    keep = [check.client, channel.fileno(), check.asker.fileno()] + ([setup.log.socket.fileno()] if setup.log.socket else [])
    close_others(keep)
    log, privileges = setup.log, setup.privileges
    log.who = "?@" + check.peer.address
    signal.alarm(LOGIN_CHECK_SECONDS)
    entry, verdict, shown = None, VERDICT_BROKEN, ""
    try:
        privsep_priv_user(privileges)
        request = login_parse(check.message)
        if request.negotiated.sni:
            check = check._replace(peer=check.peer._replace(sni=request.negotiated.sni.decode("ascii", "replace")))
        shown = printable(request.user)
        try:
            account = login_account(setup, request, check.peer)
            wipe(request.password)
        except Refused as refusal:
            log.warning("Authentication failed for user [%s] [%s]" % (shown or "anonymous", refusal))
            refusal_event(setup, request, check.peer, str(refusal))
            verdict = VERDICT_WRONG
        else:
            entry = enter(setup, check, account, request, channel)
            verdict = VERDICT_IN
    except Overcrowded as error:
        log.warning("Login refused for user [%s] [%s]" % (shown or "anonymous", error))
        refusal_event(setup, request, check.peer, str(error))
        verdict = VERDICT_LIMIT
    except (BackendBroken, ConfigError, MessageError, OSError) as error:
        log.error("Login not possible for user [%s]: %s" % (shown or "anonymous", error))
    except Exception:
        log.error("bug: " + traceback_text())
    wipe(check.message)
    try:
        check.asker.send(NUMBERED.pack(VERDICT, check.number, verdict))
    except OSError:
        pass                                                # who asked is gone; PRIV learns the verdict all the same
    if entry is None:                                       # anonymous users have guessed nothing
        os._exit(LOGIN_EXIT + (verdict if shown else VERDICT_BROKEN))
    os.close(check.asker.fileno())
    signal.alarm(0)
    channel.send(PLAIN.pack(ADMITTED, 0))
    serve(setup.options, log, entry)


def refusal_event(setup: Setup, request: LoginRequest, peer: Peer, reason: str) -> None:
    """Tell the logs that record events (-O json:) of a login that was refused. As root."""
    events = tuple((form, path) for form, path in setup.options.altlog if form == "json")
    logs = transferlogs_open(events, setup.log)
    transferlog_event(logs, "refusal", request.user, peer.address, time.time(), reason=reason)


def serve(options: Any, log: Log, entry: Entry) -> None:
    """The session, from 230 on. Nothing is privileged any more."""
    name = printable(entry.account.name)
    log.info("%s is now logged in" % name)
    log.who = "%s@%s" % (name, entry.host)
    session = Session(options, log, entry)
    session.event("login")
    session.run()


def enter(setup: Setup, check: Check, account: Account, request: LoginRequest, channel: socket.socket) -> Entry:
    """Prepare what needs root, then become the user for good.

    Raises OSError, ConfigError, Overcrowded, BackendBroken.
    """
    options, log, peer = setup.options, setup.log, check.peer
    home = home_of(options, account)
    if options.createhomedir:
        home_make(home, account, options)
    host, rules = names_needed(setup, peer)
    users = options.peruserlimits or (None, None)
    limit = account.max_sessions if account.max_sessions is not None else users[account.anonymous]
    statedir_empty(setup.statedir)
    board = scoreboard_claim(setup.statedir, os.getpid(), peer)
    if not scoreboard_admit(setup.statedir, board, account.name, limit):
        raise Overcrowded("%d sessions of this account are open already" % (limit or 0))
    logs = transferlogs_open(options.altlog, log)
    pipe = uploadpipe_or_none(setup) if options.uploadscript else None
    system = account.backend in ("unix", "pam")
    names = listing_names(account.uid, () if account.anonymous else (account.gid,), home.locked, system)
    load = options.maxload is not None and os.getloadavg()[0] > options.maxload
    control = socket.socket(fileno=check.client)
    tree, root = settle(setup, account, home)
    control_prepare(control)
    return Entry(account, peer, tree, control, channel, request.negotiated, request.pending, root, home.start, home.locked,
                 home.trusted, host, names, setup.aliases, board, logs, pipe, check.tls, time.localtime().tm_gmtoff, load,
                 rules, system_home)


def uploadpipe_or_none(setup: Setup) -> "UploadPipe | None":
    """What announces uploads. Without it the upload script is not called, which the log tells, and users work on."""
    try:
        return uploadpipe_open(setup.statedir)
    except ConfigError as error:
        setup.log.error("the upload script will not be called: %s" % error)
        return None


def names_needed(setup: Setup, peer: Peer) -> "tuple[str, tuple[Any, ...]]":
    """(The client's name unless -H, -P's rules with addresses for names), asked where it can do no harm, and only what has
    to be asked. A rule whose name has no address is left out.
    """
    def dotted(text: str) -> bool:
        return text.replace(".", "").isdigit()

    options = setup.options
    addresses = {name: name for _, name in options.forcepassiveip if dotted(name)}
    names = [name for _, name in options.forcepassiveip if not dotted(name)]
    if options.dontresolve and not names:
        return peer.address, options.forcepassiveip
    *found, host = unprivileged_answer(setup.privileges, lambda: names_of_network(
        names, None if options.dontresolve else peer.address)).decode("ascii", "replace").split("\n")
    addresses.update((name, address) for name, address in zip(names, found) if dotted(address))
    for name in names:
        if name not in addresses:
            setup.log.warning("ForcePassiveIP (-P): %s has no IPv4 address now, PASV tells another address" % name)
    clean = "".join(c for c in host if c.isalnum() or c in ".-_:%")[:255]
    rules = tuple((network, addresses[name]) for network, name in options.forcepassiveip if name in addresses)
    return clean or peer.address, rules


def settle(setup: Setup, account: Account, home: Home) -> "tuple[Tree, bytes]":
    """Lock this process into the home, become the user, stand where the session starts: (its files, where its / is).

    Raises ConfigError, OSError before anything is given up; afterwards ConfigError for a start that the user cannot enter.
    """
    privileges, log = setup.privileges, setup.log
    walked = home.locked
    try:
        top = os.open(home.root, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        if privileges.root and home.locked:
            walked = not confine(top)
    except OSError as error:
        remedy = " (-j makes homes that are missing)" if error.errno == errno.ENOENT else ""
        raise ConfigError(f"the home {printable(home.root)} of {printable(account.name)}: {error.strerror}{remedy}") from None
    if privileges.root:
        become(account.uid, account.gid, account.groups or (account.gid,))
    os.umask(0)
    root = home.root.rstrip(b"/") if home.locked else b""
    if privileges.root and not walked:
        os.close(top)
        tree: Tree = KernelTree()
    else:
        os.set_inheritable(top, False)
        tree = WalkedTree(top, setup.own, home.root)
        confined = home.locked and landlock_confine(top)
        if home.locked and not confined:
            log.notice("No Landlock here: %s is confined by walking its paths alone" % printable(account.name))
    for start in (home.start, b"/") if home.locked else (home.start,):
        try:
            tree.change_directory(start)
            return tree, root
        except OSError as error:
            reason = error.strerror
    raise ConfigError(f"the home {printable(root + home.start)} of {printable(account.name)}: {reason}")


def control_prepare(control: socket.socket) -> None:
    """A client that takes no reply for long is gone; urgent data (telnet's Synch) comes in line."""
    control.setblocking(True)
    control.setsockopt(socket.SOL_SOCKET, socket.SO_SNDTIMEO, struct.pack("@ll", SEND_SECONDS, 0))
    try:
        control.setsockopt(socket.SOL_SOCKET, socket.SO_OOBINLINE, 1)
    except OSError:
        pass                                                # a relay, where the system does not know this for it


def system_home(name: bytes) -> "bytes | None":
    """The home of a system user, for CWD ~name."""
    import pwd
    try:
        return os.fsencode(pwd.getpwnam(os.fsdecode(name)).pw_dir)
    except KeyError:
        return None

# ==== Setup =======================================================================================
# What the options become before anybody is served, at the start and again at SIGHUP: listening sockets, certificates,
# the empty directory, the list of our own files. Everything here is the administrator's; a mistake in it is a
# ConfigError, and nothing has changed then.

ALIASES_FILE = "/etc/pure-ftpd/pureftpd-dir-aliases"
SYSTEMD_FIRST_FD = 3


def defaults_without_root(options: Any) -> None:
    """An ordinary user's server: this machine only, port 2121, and without -l anonymous and read-only.

    Raises ConfigError.
    """
    if not options.bind:
        options.bind = (("::1" if options.ipv6only else "127.0.0.1", None),)
    if not options.login:
        if options.noanonymous:
            raise ConfigError("-E: nobody can log in: without root, accounts need -l puredb:FILE (see: pureftpd.py pw)")
        if not options.anonymousonly:
            options.anonymousonly = options.anonymouscantupload = True
    elif not options.anonymousonly and "FTP_ANON_DIR" not in os.environ:
        options.noanonymous = True
    if ("unix", None) in options.login:
        raise ConfigError("-l unix: only root can check the passwords of system users; use -l puredb:FILE")


def options_complete(options: Any) -> None:
    """Fill in what depends on who and where we are. Raises ConfigError."""
    options.server_uid = os.geteuid()
    if os.geteuid():
        defaults_without_root(options)
    if options.passiveportrange:
        first, last = options.passiveportrange
        options.maxclientsnumber = max(1, min(options.maxclientsnumber, (last - first + 1) // 2))
    options.statedir = options.statedir or statedir_default()


def listening_addresses(options: Any) -> "list[tuple[int, tuple[Any, ...], bool]]":
    """(family, address, implicit TLS) of every socket that -S, --tlsbind, -4 and -6 ask for. Raises ConfigError."""
    families = [family for family, off in ((socket.AF_INET, options.ipv6only), (socket.AF_INET6, options.ipv4only)) if not off]
    places = [(host, port, 2121 if os.geteuid() else 21, False) for host, port in options.bind or ((None, None),)]
    places += [(host, port, 990, True) for host, port in options.tlsbind]
    found: "list[tuple[int, tuple[Any, ...], bool]]" = []
    for host, port, usual, implicit in places:
        before = len(found)
        for family in families:
            try:
                info = socket.getaddrinfo(host and host.encode(), usual if port is None else port, family,
                                          socket.SOCK_STREAM, 0, socket.AI_PASSIVE)
            except OSError:
                continue
            found.append((family, info[0][4], implicit))
        if len(found) == before:
            raise ConfigError(f"-S {host}: no such address on this machine, or not of the family that -4 or -6 asks for")
    return found


def listener_open(family: int, address: "tuple[Any, ...]", options: Any) -> socket.socket:
    """A listening socket. Raises OSError."""
    sock = socket.socket(family, socket.SOCK_STREAM)
    try:
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        if family == socket.AF_INET6:
            sock.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 1)
        sock.bind(address)
        sock.listen(max(128, 3 + options.maxclientsnumber // 8))
    except OSError:
        sock.close()
        raise
    return sock


def listeners_renew(options: Any, old: "list[Listener]") -> "list[Listener]":
    """What is to be listened on, with those of `old` that are still asked for.

    Raises ConfigError; then nothing is opened.
    """
    if os.environ.get("LISTEN_PID") == str(os.getpid()):
        return old or systemd_listeners()
    before = {listener[:3]: listener for listener in old}
    named = any(":" in (host or "") and host != "::" for host, _ in (*options.bind, *options.tlsbind))       # IPv6 is asked for
    listeners: "list[Listener]" = []
    for family, address, implicit in listening_addresses(options):
        there = before.get((family, address, implicit))
        try:
            listeners.append(there or Listener(family, address, implicit, listener_open(family, address, options)))
        except OSError as error:
            if family == socket.AF_INET6 and not named and error.errno in (errno.EAFNOSUPPORT, errno.EADDRNOTAVAIL):
                continue                                    # a machine without IPv6
            for listener in listeners:
                if listener not in old:
                    listener.sock.close()
            raise ConfigError("cannot listen on %s port %d: %s%s" % (
                address[0], address[1], error.strerror, LISTEN_REMEDIES.get(error.errno or 0, ""))) from None
    if not listeners:
        raise ConfigError("there is no address to listen on: give one with -S")
    return listeners


LISTEN_REMEDIES = {
    errno.EADDRINUSE: "; another server has it: stop that one, or choose a port with -S ,PORT",
    errno.EACCES: "; ports below 1024 are root's: choose another one with -S ,PORT",
}


def systemd_listeners() -> "list[Listener]":
    """The sockets that systemd listens on for us (sd_listen_fds(3))."""
    count = os.environ.get("LISTEN_FDS", "0")
    try:
        sockets = [socket.socket(fileno=fd) for fd in range(SYSTEMD_FIRST_FD, SYSTEMD_FIRST_FD + int(count))]
    except (ValueError, OSError) as error:
        raise ConfigError(f"LISTEN_FDS {count}: {getattr(error, 'strerror', None) or error}") from None
    for sock in sockets:
        os.set_inheritable(sock.fileno(), False)
        if sock.family not in (socket.AF_INET, socket.AF_INET6):
            raise ConfigError("LISTEN_FDS: a socket that systemd hands over must be of TCP: ListenStream= with a port")
    if not sockets:
        raise ConfigError("LISTEN_FDS is 0: systemd handed no socket over")
    return [Listener(sock.family, sock.getsockname(), False, sock) for sock in sockets]


def aliases_read(path: str) -> "dict[bytes, bytes]":
    """pureftpd-dir-aliases: lines in pairs, a name and the directory it stands for; blank lines and # comments are
    skipped.
    """
    try:
        with open(path, "rb") as file:
            lines = [line.strip() for line in file.read(1 << 20).split(b"\n")]
    except OSError:
        return {}
    lines = [line for line in lines if line and not line.startswith(b"#")]
    return dict(zip(lines[::2], lines[1::2]))


def own_files(options: Any) -> OwnFiles:
    """Every file of the server that a session without chroot must leave alone."""
    files = [os.path.abspath(__file__), *options.configfiles, *options.certfile, options.pidfile, options.fortunesfile,
             os.environ.get("PURE_PASSWDFILE")]
    files += [path for _, path in options.altlog]
    for _, path in options.login:
        if path:
            files += [path, os.path.splitext(path)[0] + ".passwd"]
    directories = [options.statedir, options.extcert, "/proc"]          # /proc: our memory, too
    return OwnFiles([os.fsencode(path) for path in files if path], [os.fsencode(path) for path in directories if path])


def setup_read(options: Any, log: Log, privileges: Privileges, old: "Setup | None" = None) -> Setup:
    """Prepare all that children will need. Raises ConfigError."""
    options_complete(options)
    if old and options.statedir != old.statedir:
        raise ConfigError("--statedir: the directory in use cannot be changed; restart the server")
    statedir_prepare(options.statedir)
    empty = statedir_empty(options.statedir)
    if not options.anonymousonly:
        authentication_preload(options, log)
    for transferlog in transferlogs_open(options.altlog, log):          # sessions open them; what is wrong is told now
        os.close(transferlog.fd)
    own = None if privileges.root else own_files(options)
    anonymous = old.anonymous_root if old else os.getcwdb()
    greeting, aliases = Greeting(options), aliases_read(ALIASES_FILE)
    certificates = certificates_read(options, log, old.certificates if old else None)   # last: nobody would close them
    return Setup(options, log, privileges, options.statedir, os.fsencode(empty), aliases, greeting, certificates, own, anonymous)


def certificates_read(options: Any, log: Log, before: "Certificates | None") -> "Certificates | None":
    """The certificates that -Y needs; None without TLS. Raises ConfigError."""
    if not options.tls:
        if options.tlsbind:
            raise ConfigError("--tlsbind: TLS is off; switch it on with -Y 1, 2 or 3")
        return None
    try:
        import ssl
    except ImportError:
        raise ConfigError("-Y %d: this Python was built without OpenSSL (no ssl module)" % options.tls) from None
    del ssl
    if options.tlsselfsigned:
        certificate_make(options, log)
    return Certificates(options, log, before)

# ==== PRIV: the parent of all =====================================================================
# PRIV forks: SERVER, a login child for each LOGIN, a TLS process for each STARTTLS; and it answers what these ask.
# Each has a channel of its own, so PRIV knows who speaks and what it may ask (MONITOR_ANSWERS). It waits for nothing
# but messages and signals. A malformed or unexpected message closes its channel, which ends the process at the other
# side, and harms nobody else.

SIGTERM = int(signal.SIGTERM)
STATE_SERVER, STATE_TLS, STATE_LOGIN, STATE_SESSION = "SERVER", "TLS", "LOGIN", "SESSION"


PROCESS_TITLES = {
    STATE_SERVER: "pure-ftpd (SERVER)",
    STATE_TLS: "pure-ftpd (TLS)",
    STATE_LOGIN: SESSION_TITLES[SCOREBOARD_IDLE],
}


class Child:
    """A process that PRIV has forked."""

    def __init__(self, pid: int, state: str, channel: socket.socket, number: int = 0, peer: "Peer | None" = None,
                 asker: "Child | None" = None, tls: "ClientTls | None" = None, altlog: "tuple[Any, ...]" = ()) -> None:
        self.pid, self.state, self.channel = pid, state, channel
        self.number = number                    # the id of the LOGIN or STARTTLS it was forked for
        self.peer, self.asker = peer, asker
        self.tls = tls                          # till its client is logged in
        self.altlog = altlog                    # -O as it was when a session began
        self.consultation = 0                   # under which number SERVER permitted the login, 0 when it was not asked

    def forget_tls(self) -> None:
        if self.tls is not None:
            wipe(self.tls.ticket_keys)
            self.tls = None


class Monitor:
    """PRIV's loop."""

    def __init__(self, setup: Setup, argv: "list[str]", listeners: "list[Listener]",
                 inetd: "socket.socket | None" = None) -> None:
        self.setup, self.argv, self.listeners, self.inetd = setup, argv, listeners, inetd
        self.children: "dict[int, Child]" = {}
        # by our number: logins of TLS clients that SERVER must permit
        self.consulting: "dict[int, tuple[Check, Child]]" = {}
        self.consultations = 0
        self.waiting: "deque[tuple[Check, Child]]" = deque()    # logins for which there is no child yet
        self.unsent: "deque[tuple[Child, bytes]]" = deque()     # messages for which there was no room
        self.checking: "dict[int, float]" = {}                  # children that check credentials now: until when (monotonic)
        self.server: "Child | None" = None                      # the SERVER that accepts; others drain
        self.generation = 0
        self.server_started = 0.0
        self.restart_at: "float | None" = None
        self.quick_ends = 0                                     # times in a row that SERVER ended right after its start
        self.status = 0                                         # the daemon's exit status
        self.stop_at: "float | None" = None                     # when those that are left will be killed
        self.kills = 0                                          # how often they were
        self.pipe: "int | None" = None                          # of -o, since a SIGHUP
        self.selector = selectors.DefaultSelector()
        self.directory = os.getcwd()                        # what relative names of the command line are relative to

    def run(self) -> None:
        """Serve until SIGTERM or SIGINT has ended everything."""
        self.catch_signals()
        self.start_server()
        privsep_unpriv_user(self.setup.privileges)
        notify_systemd("READY=1")
        while self.children or self.restart_at is not None:
            for key, _ in self.selector.select(self.pause()):
                key.data(key.fileobj)
            self.on_time(time.monotonic())

    def pause(self) -> "float | None":
        due = [when for when in (self.restart_at, self.stop_at, *self.checking.values()) if when is not None]
        if self.unsent:
            due.append(time.monotonic() + UNSENT_SECONDS)
        return max(0.0, min(due) - time.monotonic()) if due else None

    def on_time(self, now: float) -> None:
        if self.unsent:
            self.tell_late()
        if self.restart_at is not None and now >= self.restart_at:
            self.restart_at = None
            self.start_server()
        for pid in [pid for pid, until in self.checking.items() if now >= until]:
            self.give_up(self.children[pid])
        if self.stop_at is not None and now >= self.stop_at:
            self.stop_at = now + 1.0
            self.kills += 1
            for child in self.children.values():
                root_kill(self.setup.privileges, child.pid)
            if self.kills > KILLS_MAX:
                self.setup.log.error("%d processes cannot be ended: is there a disk that does not answer?" % len(self.children))
                self.children.clear()

    # -- signals -------------------------------------------------------------------------------------

    def catch_signals(self) -> None:
        """Signals become bytes in a socket, which the loop reads."""
        self.wake, writer = socket.socketpair()
        self.wake.setblocking(False)
        writer.setblocking(False)
        self.waker = writer
        signal.set_wakeup_fd(writer.fileno(), warn_on_full_buffer=False)
        for number in (signal.SIGTERM, signal.SIGINT, signal.SIGQUIT, signal.SIGHUP, signal.SIGCHLD):
            signal.signal(number, lambda *_: None)
        self.selector.register(self.wake, selectors.EVENT_READ, self.on_signal)

    def on_signal(self, wake: socket.socket) -> None:
        numbers = set(wake.recv(4096))
        if numbers & {signal.SIGTERM, signal.SIGINT, signal.SIGQUIT}:
            self.stop()                                     # first: SERVER may have got the signal, too
        if signal.SIGCHLD in numbers:
            self.reap()
        if signal.SIGHUP in numbers and self.stop_at is None and self.inetd is None:
            self.reload()

    def stop(self) -> None:
        """No new clients, goodbye to who is idle; what is being transferred gets STOP_SECONDS."""
        if self.stop_at is not None:
            return
        notify_systemd("STOPPING=1")
        self.setup.log.notice("Shutting down")
        self.stop_at = time.monotonic() + STOP_SECONDS + 1
        self.restart_at = None
        for listener in self.listeners:
            listener.sock.close()
        self.listeners = []
        for check, _ in self.waiting:
            os.close(check.client)
        self.waiting.clear()
        for child in self.children.values():
            self.tell(child, PLAIN.pack(STOP, 0))

    def tell(self, child: Child, message: bytes) -> None:
        """Send a message if the child still listens; to SERVER, when its queue is full, as soon as it is not.

        Any other child that lets its queue fill up does not want to be told anything.
        """
        try:
            if self.unsent and child.state == STATE_SERVER:
                raise BlockingIOError
            child.channel.send(message, socket.MSG_DONTWAIT)
        except BlockingIOError:
            if child.state == STATE_SERVER and len(self.unsent) < UNSENT_MAX:
                self.unsent.append((child, message))
            elif child.state == STATE_SERVER:
                self.drop_channel(child)                        # a SERVER that reads nothing is none
        except OSError:
            pass                                                # it has ended, which SIGCHLD tells, too

    def tell_late(self) -> None:
        """Send what did not fit before, in its order."""
        while self.unsent:
            child, message = self.unsent[0]
            try:
                child.channel.send(message, socket.MSG_DONTWAIT)
            except BlockingIOError:
                return
            except OSError:
                pass                                            # it has ended
            self.unsent.popleft()

    # -- children ------------------------------------------------------------------------------------

    def fork(self, state: str, function: "Callable[[socket.socket], None]", **known: Any) -> Child:
        """A child that runs `function(its channel)` and ends; OSError when there can be none.

        A TLS client has two processes. Whoever has taken SERVER over cannot fill the machine with them.
        """
        if state != STATE_SERVER and len(self.children) > 2 * self.setup.options.maxclientsnumber + LOGIN_CHECKS:
            raise OSError(errno.EAGAIN, "there are more processes than -c can explain")
        self.renew_log()
        ours, theirs = channel_pair()
        try:
            pid = os.fork()
        except OSError:
            ours.close()
            theirs.close()
            raise
        if not pid:
            try:
                signal.set_wakeup_fd(-1)
                signal_default(SIGTERM)                 # the other handlers do nothing, which is right for children
                process_title(PROCESS_TITLES[state])
                function(theirs)
            except ConfigError as error:
                self.setup.log.error("%s cannot run: %s" % (state, error))
            except Exception:
                self.setup.log.error("bug: " + traceback_text())
            finally:
                os._exit(0)
        theirs.close()
        ours.setblocking(False)
        child = Child(pid, state, ours, **known)
        self.children[pid] = child
        self.selector.register(ours, selectors.EVENT_READ, lambda _: self.on_message(child))
        return child

    def renew_log(self) -> None:
        """Follow a syslogd that was started again, and have SERVER follow."""
        if not self.setup.log.reconnect():
            return
        assert self.setup.log.socket is not None
        for child in self.children.values():
            if child.state == STATE_SERVER:
                try:
                    socket.send_fds(child.channel, [PLAIN.pack(NEWLOG, 0)], [self.setup.log.socket.fileno()])
                except OSError:
                    pass                                    # it has ended, or reads nothing: the next one is forked with it

    def start_server(self) -> None:
        """A SERVER that knows the sessions there are, and accepts from now on; those before it stay for their
        visitors.
        """
        self.generation = self.generation % 255 + 1
        sessions = {child.number: child.peer.address for child in self.children.values()
                    if child.peer and (child.state == STATE_TLS or child.asker and child.asker.state == STATE_SERVER)}
        self.server_started = time.monotonic()
        try:
            self.server = self.fork(STATE_SERVER, lambda channel: self.server_child(channel, sessions))
        except OSError as error:
            self.setup.log.error("cannot fork SERVER: %s" % error.strerror)
            self.restart_at = self.server_started + SERVER_RESTART_SECONDS
            return
        for number, (check, _) in self.consulting.items():
            self.tell(self.server, addressed_message(CONSULT, number, check.peer.address))
        for other in self.children.values():
            if other.state == STATE_SERVER and other is not self.server:
                self.tell(other, PLAIN.pack(DRAIN, 0))

    def forget_secrets(self, tls: "ClientTls | None" = None) -> None:
        """In a child: drop what is not its business, certificates' keys, other clients' keys and passwords."""
        for child in self.children.values():
            if child.tls is not tls:
                child.forget_tls()
        if self.setup.certificates is not None:
            self.setup.certificates.contexts.clear()            # OpenSSL overwrites keys that it frees
        if tls is not None:
            tls.put_keys()
        wipe(*[check.message for check, _ in (*self.waiting, *self.consulting.values())])
        self.waiting.clear()
        self.consulting.clear()

    def server_child(self, channel: socket.socket, sessions: "dict[int, str]") -> None:
        self.forget_secrets()
        setup = self.setup
        keep = [channel.fileno()] + [listener.sock.fileno() for listener in self.listeners]
        keep += [setup.log.socket.fileno()] if setup.log.socket else []
        keep += [self.inetd.fileno()] if self.inetd else []
        close_others(keep)
        privsep_priv_user(setup.privileges)
        cage(setup.privileges, setup.empty, setup.log)
        defender = Defender(setup.options.banafter, setup.options.bantime, setup.options.neverban)
        server = Server(setup.options, setup.log, channel, self.listeners, sessions, defender, setup.greeting,
                        self.generation << 24)
        if self.inetd is not None:
            server.welcome(self.inetd, self.inetd.getpeername())
            server.draining = True
        server.run()

    def reap(self) -> None:
        """Take note of every child that has ended."""
        while True:
            try:
                pid, status = os.waitpid(-1, os.WNOHANG)
            except ChildProcessError:
                return
            if not pid:
                return
            child = self.children.pop(pid, None)
            if child is not None:
                self.gone(child, status)

    def gone(self, child: Child, status: int) -> None:
        """Clean up behind a child, and tell who counts on it."""
        while self.stop_at is None and self.on_message(child):
            pass                                            # what it said before it ended
        self.drop_channel(child)
        child.forget_tls()
        if os.WIFSIGNALED(status) and self.stop_at is None:
            self.setup.log.warning("%s process %d%s was ended by signal %d" % (
                child.state, child.pid, f" of {child.peer.address}" if child.peer else "", os.WTERMSIG(status)))
        if child.state in (STATE_LOGIN, STATE_SESSION):
            root_scoreboard_remove(self.setup.privileges, self.setup.statedir, child.pid)
        if child.state == STATE_LOGIN:
            verdict = os.WEXITSTATUS(status) - LOGIN_EXIT if os.WIFEXITED(status) else VERDICT_BROKEN
            self.consulted(child, verdict)
            self.check_done(child)
        ended = NUMBERED.pack(ENDED, child.number, 0)
        if child.asker is not None and child.asker.state == STATE_TLS:
            if child.state == STATE_LOGIN:
                self.tell(child.asker, ended)
        elif child.state != STATE_SERVER:
            self.tell_servers(ended)
        if child is self.server:
            self.server_gone()

    def server_gone(self) -> None:
        """SERVER has ended: start it again, unless that is how it should be."""
        self.server = None
        if self.stop_at is None and self.inetd is None:
            now = time.monotonic()
            self.quick_ends = self.quick_ends + 1 if now < self.server_started + SERVER_RESTART_SECONDS else 0
            if self.quick_ends >= SERVER_QUICK_ENDS:
                self.setup.log.error("SERVER cannot run: giving up")
                self.status = 1
                self.stop()
                return
            self.setup.log.error("SERVER is gone, starting it again")
            self.restart_at = max(now, self.server_started + SERVER_RESTART_SECONDS)

    def tell_servers(self, message: bytes) -> None:
        for child in self.children.values():
            if child.state == STATE_SERVER:
                self.tell(child, message)

    def drop_channel(self, child: Child) -> None:
        self.end_consultations(child)
        if child.channel.fileno() >= 0:
            self.selector.unregister(child.channel)
            child.channel.close()

    # -- messages ------------------------------------------------------------------------------------

    def on_message(self, child: Child) -> bool:
        """One message of a child; anything that is not in MONITOR_ANSWERS for its state closes the channel.

        Whether there was one.
        """
        fds: "list[int]" = []
        if child.channel.fileno() < 0:
            return False                                    # closed in this very round
        try:
            message, fds = message_receive(child.channel, 1)
            if not message:
                self.drop_channel(child)
                return False
            answer = MONITOR_ANSWERS.get((child.state, message[0]))
            if answer is None:
                raise MessageError("message %d is not for a %s process to send" % (message[0], child.state))
            answer(self, child, message, fds)
        except BlockingIOError:
            return False
        except ConnectionResetError:                        # it ended without reading our last answer
            self.drop_channel(child)
        except (MessageError, OSError, ValueError) as error:
            self.setup.log.error("closing the channel of %s process %d: %s" % (child.state, child.pid, error))
            self.drop_channel(child)
        except Exception:
            self.setup.log.error("bug: " + traceback_text())
            self.drop_channel(child)
        finally:
            for fd in fds:                                  # those that nobody took, or asked for
                os.close(fd)
        return True

    def on_login(self, child: Child, message: bytes, fds: "list[int]") -> None:
        """SERVER or TLS has credentials to be checked."""
        number = login_id(message)
        if child.state == STATE_TLS and child.tls is None:
            raise MessageError("LOGIN of a client that is logged in already")
        if not fds:                                         # or we have no room for it
            self.tell(child, NUMBERED.pack(VERDICT, number, VERDICT_BROKEN))
            return
        peer = child.peer or peer_of(fds[0])
        full = len(self.waiting) + len(self.consulting) > self.setup.options.maxclientsnumber
        if full or peer is None:                            # None: the client is gone already
            os.close(fds.pop())
            self.tell(child, NUMBERED.pack(VERDICT, number, VERDICT_BROKEN))
            return
        login = Check(number, message, fds.pop(), peer, child.channel, child.tls), child
        if child.state == STATE_TLS:
            self.end_consultations(child)
            self.consult(*login)
        else:
            self.waiting.append(login)
            self.next_check()

    def consult(self, check: Check, asker: Child) -> None:
        """SERVER, where the tries of all clients are counted, decides when this one's password may be checked."""
        self.consultations = self.consultations % 0xFFFFFFFF + 1
        self.consulting[self.consultations] = check, asker
        if self.server is not None:
            self.tell(self.server, addressed_message(CONSULT, self.consultations, check.peer.address))

    def end_consultations(self, asker: Child) -> None:
        """What this TLS process asked for and has not got is not wanted any more."""
        for number in [number for number, (_, child) in self.consulting.items() if child is asker]:
            os.close(self.consulting.pop(number)[0].client)

    def on_granted(self, child: Child, message: bytes, fds: "list[int]") -> None:
        _, number, refused = numbered_parse(message)
        check, asker = self.consulting.pop(number, (None, None))
        if check is None or asker is None:                  # the client has gone meanwhile
            self.tell(child, NUMBERED.pack(OUTCOME, number, VERDICT_BROKEN))
            return
        if refused:
            os.close(check.client)
            wipe(check.message)
            self.tell(asker, NUMBERED.pack(VERDICT, check.number, VERDICT_WRONG))
        else:
            self.waiting.append((check._replace(consultation=number), asker))
            self.next_check()

    def consulted(self, child: Child, verdict: int) -> None:
        """Tell SERVER how a login ended that it has permitted."""
        if child.consultation:
            self.tell_servers(NUMBERED.pack(OUTCOME, child.consultation, min(max(verdict, 0), VERDICT_LIMIT)))
            child.consultation = 0

    def next_check(self) -> None:
        """Fork children for those who wait, as many as may be at work at once."""
        while self.waiting and len(self.checking) < LOGIN_CHECKS:
            check, asker = self.waiting.popleft()
            begun = False
            try:
                if asker.channel.fileno() >= 0 and asker.tls is check.tls:      # or it is in already
                    child = self.fork(STATE_LOGIN, self.check_by(check),
                                      number=check.number, peer=check.peer, asker=asker, altlog=self.setup.options.altlog)
                    child.consultation, begun = check.consultation, True
                    self.introduce(child)
                    self.checking[child.pid] = time.monotonic() + LOGIN_CHECK_SECONDS + 2
            except OSError as error:
                self.setup.log.error("cannot fork: %s" % error.strerror)
                self.tell(asker, NUMBERED.pack(VERDICT, check.number, VERDICT_BROKEN))
            finally:
                os.close(check.client)
                wipe(check.message)                         # the next child is somebody else's
            if check.consultation and not begun:
                self.tell_servers(NUMBERED.pack(OUTCOME, check.consultation, VERDICT_BROKEN))

    def introduce(self, child: Child) -> None:
        """Tell the SERVER that accepts of a client that came in through one that drains."""
        if self.server is not None and child.peer and child.asker and child.asker.state == STATE_SERVER \
                and child.asker is not self.server:
            self.tell(self.server, addressed_message(JOINED, child.number, child.peer.address))

    def check_by(self, check: Check) -> "Callable[[socket.socket], None]":
        def run(channel: socket.socket) -> None:
            self.forget_secrets(check.tls)
            login_child(self.setup, check, channel)
        return run

    def check_done(self, child: Child) -> None:
        if self.checking.pop(child.pid, None) is not None:
            self.next_check()

    def give_up(self, child: Child) -> None:
        """A login child has not even heard its alarm clock: the kernel waits for a disk. Others shall not wait for it, too."""
        assert child.peer is not None and child.asker is not None
        self.setup.log.error("A login from %s does not end, nor can it be ended now: is there a home, a database or a log on a "
                             "disk that does not answer?" % child.peer.address)
        root_kill(self.setup.privileges, child.pid)
        self.tell(child.asker, NUMBERED.pack(VERDICT, child.number, VERDICT_BROKEN))
        self.consulted(child, VERDICT_BROKEN)
        self.check_done(child)

    def on_admitted(self, child: Child, message: bytes, fds: "list[int]") -> None:
        plain_parse(message)
        child.state = STATE_SESSION
        self.consulted(child, VERDICT_IN)
        if child.asker is not None:
            child.asker.forget_tls()                        # both of its processes have it
        self.check_done(child)

    def on_starttls(self, child: Child, message: bytes, fds: "list[int]") -> None:
        """A client of SERVER wants TLS: it gets a process, and an SSLContext, of its own."""
        number, negotiated = starttls_parse(message)
        if not fds or self.setup.certificates is None:      # no room for it, or TLS is off since a SIGHUP
            self.tell(child, NUMBERED.pack(ENDED, number, 0))
            return
        client = fds.pop()
        try:
            peer = peer_of(client)
            if peer is None:
                raise OSError(errno.ENOTCONN, "it is gone already")
            self.fork_tls(child, number, client, peer._replace(encrypted=True), negotiated)
        except OSError as error:
            self.setup.log.error("no TLS for a client: %s" % error)
            self.tell(child, NUMBERED.pack(ENDED, number, 0))
        finally:
            os.close(client)

    def fork_tls(self, asker: Child, number: int, client: int, peer: Peer, negotiated: Negotiated) -> None:
        assert self.setup.certificates is not None
        with as_root(self.setup.privileges):
            tls = self.setup.certificates.of_client(negotiated.sni)
        try:
            self.introduce(self.fork(STATE_TLS, lambda channel: self.tls_child(channel, client, tls, negotiated, peer),
                                     number=number, peer=peer, asker=asker, tls=tls))
        except OSError:
            wipe(tls.ticket_keys)
            raise

    def tls_child(self, channel: socket.socket, client: int, tls: ClientTls, negotiated: Negotiated, peer: Peer) -> None:
        self.forget_secrets(tls)
        setup = self.setup
        close_others([channel.fileno(), client] + ([setup.log.socket.fileno()] if setup.log.socket else []))
        setup.log.who = "?@" + peer.address
        privsep_priv_user(setup.privileges)
        cage(setup.privileges, setup.empty, setup.log)
        TlsDoor(setup.options, setup.log, socket.socket(fileno=client), channel, tls, negotiated, peer,
                setup.greeting if negotiated.implicit else None).run()

    def on_bindresport(self, child: Child, message: bytes, fds: "list[int]") -> None:
        _, family = plain_parse(message)
        if family not in (4, 6) or child.peer is None:
            raise MessageError("BINDRESPORT for family %d" % family)
        sock = root_bind_data_port(self.setup.privileges, child.peer.local_address,
                                   socket.AF_INET6 if family == 6 else socket.AF_INET)
        if sock is None:
            self.tell(child, PLAIN.pack(ANSWER_ERROR, 0))
            return
        with sock:
            socket.send_fds(child.channel, [PLAIN.pack(ANSWER_FD, 0)], [sock.fileno()])

    def on_reopenlog(self, child: Child, message: bytes, fds: "list[int]") -> None:
        _, index = plain_parse(message)
        if index >= len(child.altlog):
            raise MessageError("REOPENLOG %d" % index)
        fd = root_open_log(self.setup.privileges, child.altlog[index][1])
        if fd is None:
            self.tell(child, PLAIN.pack(ANSWER_ERROR, 0))
            return
        try:
            socket.send_fds(child.channel, [PLAIN.pack(ANSWER_FD, 0)], [fd])
        finally:
            os.close(fd)

    def on_removeftpwhoentry(self, child: Child, message: bytes, fds: "list[int]") -> None:
        plain_parse(message)
        root_scoreboard_remove(self.setup.privileges, self.setup.statedir, child.pid)
        self.tell(child, PLAIN.pack(ANSWER_REMOVEFTPWHOENTRY, 0))

    # -- a new configuration -------------------------------------------------------------------------

    def reload(self) -> None:
        """SIGHUP: options and listening sockets anew for those who come; a mistake in them keeps the old ones."""
        log = self.setup.log
        self.renew_log()
        notify_systemd("RELOADING=1\nMONOTONIC_USEC=%d" % (time.monotonic() * 1e6))
        try:
            with as_root(self.setup.privileges):
                os.chdir(self.directory)
                options = options_read(self.argv)
                setup = setup_read(options, log, self.setup.privileges, self.setup)
                try:
                    listeners = listeners_renew(options, self.listeners)
                except (ConfigError, OSError):
                    if setup.certificates is not None:
                        setup.certificates.close()
                    raise
                self.renew_pipe(options)
        except (ConfigError, OSError) as error:
            log.error("The old configuration stays: %s" % error)
        except Exception:
            log.error("The old configuration stays; bug: " + traceback_text())
        else:
            self.renew(setup, listeners)
            log.notice("The configuration was read again")
        notify_systemd("READY=1")

    def renew_pipe(self, options: Any) -> None:
        """The upload pipe where -o is new, or StateDir was made anew. Without it users work on (uploadpipe_or_none)."""
        if options.uploadscript:
            try:
                pipe = uploadpipe_create(options.statedir)
            except ConfigError as error:
                self.setup.log.error("the upload script will not be called: %s" % error)
                return
            if self.pipe is not None:
                os.close(self.pipe)
            self.pipe = pipe

    def renew(self, setup: Setup, listeners: "list[Listener]") -> None:
        """Serve those who come by `setup`, on `listeners`; those who are here stay with what they have."""
        before = self.setup
        setup.log.with_pid, setup.log.verbose = setup.options.logpid, setup.options.verboselog
        for listener in self.listeners:
            if listener not in listeners:
                listener.sock.close()
        self.setup, self.listeners = setup, listeners
        if before.certificates is not None:
            before.certificates.close()
        self.start_server()


MONITOR_ANSWERS = {
    (STATE_SERVER, LOGIN): Monitor.on_login,
    (STATE_SERVER, STARTTLS): Monitor.on_starttls,
    (STATE_SERVER, GRANTED): Monitor.on_granted,
    (STATE_TLS, LOGIN): Monitor.on_login,
    (STATE_LOGIN, ADMITTED): Monitor.on_admitted,
    (STATE_SESSION, BINDRESPORT): Monitor.on_bindresport,
    (STATE_SESSION, REOPENLOG): Monitor.on_reopenlog,
    (STATE_SESSION, REMOVEFTPWHOENTRY): Monitor.on_removeftpwhoentry,
}


def peer_of(fd: int) -> "Peer | None":
    """Both ends of a client's connection, as the kernel knows them, whatever SERVER says; None when it is over.

    Raises MessageError for what is no such connection.
    """
    try:
        sock = socket.socket(fileno=fd)
    except OSError:
        raise MessageError("not a socket") from None
    try:
        if sock.family not in (socket.AF_INET, socket.AF_INET6) or sock.type != socket.SOCK_STREAM:
            raise MessageError("not a client's socket")
        there, here = sock.getpeername(), sock.getsockname()
    except OSError:
        return None
    finally:
        sock.detach()
    return Peer(address_normal(there[0]), there[1], address_scoped(here), here[1])


def notify_systemd(state: str) -> None:
    """Tell the service manager (sd_notify(3)); nothing happens where there is none."""
    path = os.environ.get("NOTIFY_SOCKET", "")
    if not path:
        return
    try:
        with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as sock:
            sock.connect("\0" + path[1:] if path[:1] == "@" else path)
            sock.send(state.encode(), socket.MSG_DONTWAIT)
    except OSError:
        pass

# ==== pw: virtual users ===========================================================================
# pure-pw(8): the file of virtual users, and the PureDB made from it. The file is text, one user a line, 18 fields
# (see PureDB above); other users' lines, comments and what cannot be understood are kept byte for byte. An option
# that sets a field is parsed into the text that the field then has: "" empties it, None leaves it as it is.
#
# The password is read and hashed before the lock is taken, because hashing takes a second; who exists is asked
# before, and again under the lock. Exit codes are the original's; with -m those of both steps are or-ed.
#
# Compat: what the original guesses at is an error here: numbers with a tail, a relative home, users and groups that
# there are not, stray words, and a colon in a field, which it turns into "_". The login may stand anywhere, so
# `list -f FILE` and `mkdb -f FILE` read FILE; mkdb heeds -F; -M takes any number of megabytes; -d / works;
# `useradd -z ''` does not lock the user out; usermod leaves the fields that it was not asked to change as they are.

PW_BAD_ARGUMENT = 1                 # also: the login is missing
PW_NO_FILE = 2
PW_EXISTS = 4                       # also: userdel finds nobody, or the file cannot be written
PW_NO_PASSWORD = 8
PW_NOT_FOUND = 16
PW_ROOT = 32
PW_NO_HOME = 64
PW_FAILURE = 255
PW_TRIES = 3                        # to type the same password twice

PW_USAGE = """\
usage: pw useradd LOGIN -u UID [-g GID] -d|-D HOME [options] [-m]      add a user; asks for the password, twice
       pw usermod LOGIN [options] [-m]                                 change what the options say
       pw userdel LOGIN [-m]                                           remove a user
       pw passwd  LOGIN [-m]                                           ask for a new password, twice
       pw show    LOGIN                                                show one user
       pw list                                                         show logins, homes and names
       pw mkdb    [DATABASE]                                           make the database that the server reads

The value '' takes a limit away: pw usermod joe -t ''. Passwords are read from a terminal, else from standard input."""


class PwError(Exception):
    """PwError(code, text): why an action failed, and the exit code for it."""


def pw_text(text: str) -> str:
    """`text`, when it can be stored in a field."""
    if any(c in ":\r\n\0" for c in text):
        raise ValueError("must not hold a colon, which separates the fields, nor a line break")
    return text


def pw_hosts(text: str) -> str:
    """A list of addresses, networks and host names."""
    if text.count(":") > 1:
        raise ValueError("an IPv6 address cannot be stored: colons separate the fields; give a host name")
    for item in filter(None, map(str.strip, pw_text(text).split(","))):
        try:
            network_parse(item)
        except ValueError as error:
            raise ValueError(f"{item}: {error}; give addresses, networks (10.0.0.0/8) or host names") from None
    return text


def pw_home(suffix: str) -> "Callable[[str], str]":
    """A parser of home directories, which end in `suffix` then."""
    def parse(text: str) -> str:
        if not text.startswith("/"):
            raise ValueError("must be an absolute path, such as /home/joe")
        return pw_text(text.rstrip("/") + suffix) or "/"
    return parse


def pw_number(lowest: int, times: int = 1) -> "Callable[[str], str]":
    """A parser of numbers from `lowest`, stored multiplied; '' stays ''."""
    def parse(text: str) -> str:
        return str(whole(lowest, 2**32 - 1, times)(text)) if text else ""
    return parse


def pw_bandwidth(text: str) -> "str | None":
    """KB/s, stored as bytes/s. Compat: 0 is as if it were not given (main)."""
    rate = pw_number(0, 1024)(text)
    return None if rate == "0" else rate


def pw_sessions(text: str) -> str:
    """Compat: 0 takes the limit away, as '' does (main); useradd stored a 0."""
    number = pw_number(0)(text)
    return "" if number == "0" else number


def pw_time(text: str) -> str:
    """ "0900-1800" as the file has it: "900-1800"."""
    if not text:
        return ""
    ends = text.split("-")
    if len(ends) != 2 or not all(is_digits(end) and int(end) < 2360 and int(end) % 100 < 60 for end in ends):
        raise ValueError("must be hhmm-hhmm, such as 0900-1800 for 9 am to 6 pm")
    return "-".join(str(int(end)) for end in ends)


PW_MEGABYTES = pw_number(0, 1 << 20)
PW_HASH_MEMORY = whole(1, 1 << 20, 1 << 20)

# fmt: off
PW_OPTIONS = (
    "The user:",
    Option("u", "UID",         "uid",   pw_text,         None,        "Owner of the files: a system user or a number"),
    Option("g", "GID",         "gid",   pw_text,         None,        "Group, by name or number [the system user's]"),
    Option("d", "Chroot",      "dir",   pw_home("/./"),  None,        "Home; the user sees nothing outside of it"),
    Option("D", "Home",        "dir",   pw_home(""),     None,        "Home; the user sees the whole system"),
    Option("c", "Gecos",       "text",  pw_text,         None,        "Full name"),
    "Limits of the user:",
    Option("t", "BandwidthDL", "KB/s",  pw_bandwidth,    None,        "Download rate [no limit]"),
    Option("T", "BandwidthUL", "KB/s",  pw_bandwidth,    None,        "Upload rate [no limit]"),
    Option("n", "QuotaFiles",  "n",     pw_number(0),    None,        "Number of files [no limit]"),
    Option("N", "QuotaSize",   "MB",    PW_MEGABYTES,    None,        "Size of all files [no limit]"),
    Option("q", "RatioUL",     "n",     pw_number(1),    None,        "-q 1 -Q 10: ten bytes down for each one up"),
    Option("Q", "RatioDL",     "n",     pw_number(1),    None,        "See -q [no limit]"),
    Option("y", "MaxSessions", "n",     pw_sessions,     None,        "Sessions at the same time [the server's -y]"),
    Option("r", "AllowClient", "hosts", pw_hosts,        None,        "Come only from 10.0.0.0/8,host.example [any]"),
    Option("R", "DenyClient",  "hosts", pw_hosts,        None,        "Do not come from these [none]"),
    Option("i", "AllowLocal",  "hosts", pw_hosts,        None,        "Come only to these of our addresses [any]"),
    Option("I", "DenyLocal",   "hosts", pw_hosts,        None,        "Do not come to these [none]"),
    Option("z", "Time",        "time",  pw_time,         None,        "Come only at this time: 0900-1800 [any]"),
    "Files and hashing:",
    Option("f", "PasswdFile",  "file",  str,             None,        "Virtual users [$PURE_PASSWDFILE, else"
                                                                    " pureftpd.passwd in /etc/pure-ftpd or /etc]"),
    Option("F", "DBFile",      "file",  str,             None,        "Database [$PURE_DBFILE, or pureftpd.pdb there]"),
    Option("m", "MkDB",        "",      flag,            False,       "Make the database, too"),
    Option("C", "Logins",      "n",     whole(1),        AUTH_LOGINS, "Logins at the same time to expect [8]"),
    Option("M", "Memory",      "MB",    PW_HASH_MEMORY,  AUTH_MEMORY, "Memory for hashing that they share [64]"),
    Option("h", "Help",        "",      flag,            False,       "Show this help and exit"),
)
# fmt: on
PW_ROWS = tuple(row for row in PW_OPTIONS if isinstance(row, Option))


def pw_default(variable: str, name: str) -> str:
    """The path that the environment says, else the original's: Debian's build has a directory of its own below /etc."""
    directory = "/etc/pure-ftpd" if os.path.isdir("/etc/pure-ftpd") else "/etc"
    return os.environ.get(variable) or os.path.join(directory, name)


def pw_lines(path: str) -> "list[bytes]":
    """The file's lines without their ends; OSError."""
    with open(path, "rb") as file:
        lines = file.read().split(b"\n")
    return lines if lines[-1] else lines[:-1]


def pw_lines_of(path: str, login: bytes, code: int = PW_NOT_FOUND) -> "list[bytes]":
    """The lines of one user, of which the first counts. None of a file that does not exist. PwError with `code`."""
    try:
        return [line for line in pw_lines(path) if line.startswith(login + b":")]
    except FileNotFoundError:
        return []
    except OSError as error:
        raise PwError(code, f"{path}: {error.strerror}") from None


def pw_edit(path: str, edit: "Callable[[list[bytes]], list[bytes]]") -> None:
    """Put edit(lines) in the place of the file's lines. PwError."""
    try:
        with Replacement(path) as new:
            lines = pw_lines(path) if os.path.exists(path) else []
            new.write(b"".join(line + b"\n" for line in edit(lines)))
    except OSError as error:
        raise PwError(PW_EXISTS, f"{error.filename or path}: {error.strerror}") from None


def pw_ask(prompt: str) -> bytes:
    """A line from standard input, not shown on a terminal. PwError at its end."""
    if sys.stdin.isatty():
        import termios
        terminal = sys.stdin.fileno()
        before = termios.tcgetattr(terminal)
        silent = before[:3] + [before[3] & ~termios.ECHO] + before[4:]
        try:
            termios.tcsetattr(terminal, termios.TCSAFLUSH, silent)
            line = pw_ask_aloud(prompt)
        except KeyboardInterrupt:
            raise PwError(PW_NO_PASSWORD, "interrupted") from None
        finally:
            termios.tcsetattr(terminal, termios.TCSADRAIN, before)
    else:
        line = pw_ask_aloud(prompt)
    if not line:
        raise PwError(PW_NO_PASSWORD, "no password was given")
    return line.partition(b"\n")[0].partition(b"\r")[0]


def pw_ask_aloud(prompt: str) -> bytes:
    """A line from standard input, with its end."""
    print(prompt, end="", flush=True)
    return sys.stdin.buffer.readline()


def pw_new_hash(options: Options) -> bytes:
    """The hash of a password that is asked for twice. PwError."""
    for _ in range(PW_TRIES):
        password = pw_ask("Password: ")
        again = pw_ask("\nEnter it again: ")
        print()
        if same_digest(password, again):
            break
        print("These are two different passwords")
    else:
        raise PwError(PW_NO_PASSWORD, f"the two passwords differed {PW_TRIES} times")
    try:
        return best_crypt(password, options.logins, options.memory).encode()
    except HashUnsupported as error:
        raise PwError(PW_FAILURE, str(error)) from None


def pw_fields_given(options: Options) -> "dict[str, bytes]":
    """The fields that the options set, as the file will have them. PwError for users and groups that there are not."""
    given = {field: getattr(options, field.replace("_", ""), None) for field in PASSWD_FIELDS}
    given["home"] = options.home or options.chroot
    given["uid"], gid = pw_owner("uid", options.uid)
    given["gid"] = pw_owner("gid", options.gid)[0] or gid
    return {field: os.fsencode(text) for field, text in given.items() if text is not None}


def pw_owner(kind: str, name: "str | None") -> "tuple[str | None, str | None]":
    """(the number of the user or group `name`, the number of the group of a user that was named); PwError."""
    import grp
    import pwd
    if not name:
        return None, None
    group = None
    try:
        if kind == "uid":
            entry = pwd.getpwnam(name)
            number, group = entry.pw_uid, str(entry.pw_gid)
        else:
            number = grp.getgrnam(name).gr_gid
    except KeyError:
        number = int(name) if is_digits(name) else 0
    if not 0 < number < 0xFFFFFFFF:
        what = "user" if kind == "uid" else "group"
        raise PwError(PW_ROOT, f"-{kind[0]} {name}: there is no such {what}, or it is root's")
    return str(number), group


def pw_line(fields: "dict[str, bytes]", code: int) -> bytes:
    """The line of these fields. PwError with `code` when the server would refuse it."""
    line = b":".join(fields.get(field, b"") for field in PASSWD_FIELDS)
    try:
        passwd_entry(line)
    except ValueError as error:
        raise PwError(code, f"user {printable(fields['login'])}: {error}") from None
    if len(line) > PASSWD_LINE_MAX:
        raise PwError(PW_BAD_ARGUMENT, f"the line would have {len(line)} bytes; the server reads {PASSWD_LINE_MAX}")
    return line


def pw_useradd(options: Options, path: str, login: bytes) -> None:
    fields = {"login": login, **pw_fields_given(options)}
    if os.geteuid():                # a server that is not root has the files of one user, its own
        fields.setdefault("uid", b"%d" % os.geteuid())
        fields.setdefault("gid", b"%d" % os.getegid())
    if "uid" not in fields or "gid" not in fields:
        raise PwError(PW_ROOT, "give a user and a group other than root's: -u UID -g GID")
    if "home" not in fields:
        raise PwError(PW_NO_HOME, "give a home directory: -d DIR, or -D DIR to let the user out of it")

    def absent(lines: "list[bytes]") -> "list[bytes]":
        if any(line.startswith(login + b":") for line in lines):
            raise PwError(PW_EXISTS, f"{path}: user {printable(login)} exists already")
        return lines
    absent(pw_lines_of(path, login, PW_EXISTS))
    pw_line({**fields, "hash": b"*"}, PW_BAD_ARGUMENT)
    line = pw_line({**fields, "hash": pw_new_hash(options)}, PW_BAD_ARGUMENT)
    pw_edit(path, lambda lines: absent(lines) + [line])


def pw_usermod(options: Options, path: str, login: bytes, hashed: "bytes | None" = None) -> None:
    changes = pw_fields_given(options)
    if hashed:
        changes["hash"] = hashed

    def modify(lines: "list[bytes]") -> "list[bytes]":
        """Compat: the first of the user's lines that can be understood, now the last one of the file; the others go."""
        kept = [line for line in lines if not line.startswith(login + b":")]
        error = PwError(PW_NOT_FOUND, f"{path}: there is no user {printable(login)}")
        for line in (line for line in lines if line.startswith(login + b":")):
            fields = dict(zip(PASSWD_FIELDS, passwd_padded(line.rstrip(b"\r").split(b":"))))
            try:
                return kept + [pw_line({**fields, **changes}, PW_NOT_FOUND)]
            except PwError as reason:
                error = reason
        raise error
    modify(pw_lines_of(path, login))
    pw_edit(path, modify)


def pw_passwd(options: Options, path: str, login: bytes) -> None:
    pw_entry(path, login)
    pw_usermod(options, path, login, pw_new_hash(options))


def pw_userdel(options: Options, path: str, login: bytes) -> None:
    def remove(lines: "list[bytes]") -> "list[bytes]":
        kept = [line for line in lines if not line.startswith(login + b":")]
        if len(kept) == len(lines):
            raise PwError(PW_EXISTS, f"{path}: there is no user {printable(login)}")
        return kept
    remove(pw_lines_of(path, login, PW_EXISTS))
    pw_edit(path, remove)


def pw_entry(path: str, login: bytes) -> PasswdEntry:
    """The user of that name; PwError."""
    error = PwError(PW_NOT_FOUND, f"{path}: there is no user {printable(login)}")
    for line in pw_lines_of(path, login):
        try:
            return passwd_entry(line.rstrip(b"\r"))
        except ValueError as reason:
            error = PwError(PW_NOT_FOUND, f"{path}: user {printable(login)}: {reason}")
    raise error


def pw_show(options: Options, path: str, login: bytes) -> None:
    import grp
    import pwd
    entry = pw_entry(path, login)
    count = pw_lines_of(path, login)[0].count(b":")         # a field that is not even there is shown as "-"

    def system(find: "Callable[[int], Any]", number: int) -> str:
        try:
            return find(number)[0]
        except KeyError:
            return "-"

    def limit(value: "int | None", unit: int = 1, suffix: str = "") -> str:
        return f"{(value or 0) // unit}{suffix} ({state(value)})"

    def state(value: "int | None") -> str:
        return "unlimited" if value is None else "enabled"

    def hosts(field: str) -> str:
        return getattr(entry, field) if PASSWD_FIELDS.index(field) <= count else "-"

    begin, _, end = (entry.time or "0-0").partition("-")
    rows = (
        ("Login", entry.login), ("Password", entry.hash),
        ("UID", f"{entry.uid} ({system(pwd.getpwuid, entry.uid)})"),
        ("GID", f"{entry.gid} ({system(grp.getgrgid, entry.gid)})"),
        ("Directory", entry.home), ("Full name", entry.gecos),
        ("Download bandwidth", limit(entry.bandwidth_dl, 1024, " Kb")),
        ("Upload   bandwidth", limit(entry.bandwidth_ul, 1024, " Kb")),
        ("Max files", limit(entry.quota_files)), ("Max size", limit(entry.quota_size, 1 << 20, " Mb")),
        ("Ratio", f"{entry.ratio_ul or 0}:{entry.ratio_dl or 0} ({state(entry.ratio_ul)}:{state(entry.ratio_dl)})"),
        ("Allowed local  IPs", hosts("allow_local")), ("Denied  local  IPs", hosts("deny_local")),
        ("Allowed client IPs", hosts("allow_client")), ("Denied  client IPs", hosts("deny_client")),
        ("Time restrictions", f"{begin:0>4}-{end:0>4} ({'enabled' if entry.time else 'unlimited'})"),
        ("Max sim sessions", limit(entry.max_sessions or None)),
    )
    pw_print(b"\n")
    for label, value in rows:
        text = value if isinstance(value, bytes) else value.encode("utf-8", "surrogateescape")
        pw_print(b"%-18s : %s\n" % (label.encode(), text))
    pw_print(b"\n")


def pw_print(data: bytes) -> None:
    sys.stdout.flush()
    sys.stdout.buffer.write(data)
    sys.stdout.buffer.flush()


def pw_list(options: Options, path: str, login: bytes) -> None:
    """Compat: a word behind `list` is ignored; the original needs one before -f."""
    form = b"%-19s %-39s %-19s\n" if sys.stdout.isatty() else b"%s\t%s\t%s\n"
    output = []
    for number, line in pw_users(path):
        try:
            entry = passwd_entry(line)
        except ValueError as error:
            pw_complain(f"{path}, line {number}: skipped: {error}")
            continue
        output.append(form % (entry.login, entry.home, entry.gecos))
    pw_print(b"".join(output))


def pw_users(path: str) -> "list[tuple[int, bytes]]":
    """(number, line) of each line that may be a user's. PwError."""
    try:
        lines = pw_lines(path)
    except OSError as error:
        raise PwError(PW_NO_FILE, f"{path}: {error.strerror}") from None
    return [(number, line.partition(b"\r")[0]) for number, line in enumerate(lines, 1)
            if line and not line.startswith((b"#", b"\r"))]


def pw_records(path: str) -> "list[tuple[bytes, bytes]]":
    """(login, rest of the line) of each user, for the database.

    Compat: lines without a colon, or with nothing behind it, are left out (do_mkdb). So are, with a warning, those of
    which the original would use a part: it might be the part without the restrictions.
    """
    records = []
    for number, line in pw_users(path):
        login, colon, rest = line.partition(b":")
        if len(line) > PASSWD_LINE_MAX or b"\0" in line:
            pw_complain(f"{path}, line {number}: left out: more than {PASSWD_LINE_MAX} bytes, or a zero byte")
        elif rest:
            records.append((login, rest))
    return records


def pw_mkdb(options: Options, path: str, database: str) -> None:
    database = database or options.dbfile or pw_default("PURE_DBFILE", "pureftpd.pdb")
    try:
        puredb_write(database, lambda: pw_records(path))
    except (OSError, ValueError) as error:
        reason = f"{error.filename or database}: {error.strerror}" if isinstance(error, OSError) else error
        raise PwError(PW_FAILURE, f"the database cannot be made: {reason}") from None


PW_WRITERS = {"useradd": pw_useradd, "usermod": pw_usermod, "userdel": pw_userdel, "passwd": pw_passwd}
PW_READERS = {"show": pw_show, "list": pw_list}


def pw_complain(text: str) -> None:
    print(f"pure-pw: {text}", file=sys.stderr)


def pw_run(function: Callable, *args: Any) -> int:
    """The exit code of one step; says what went wrong."""
    try:
        function(*args)
    except PwError as error:
        code, text = error.args
        pw_complain(text)
        return code
    return 0


def pw_action(options: Options, action: str, words: "list[str]") -> int:
    """Run one action with the words behind it. Raises ConfigError."""
    path = options.passwdfile or pw_default("PURE_PASSWDFILE", "pureftpd.passwd")
    if len(words) > 1:
        raise ConfigError(f"{words[1]}: what is this? {action} takes one name, the rest are options")
    if options.memory // options.logins > HASH_MEMORY_MAX:
        raise ConfigError(f"-M and -C: {options.memory // options.logins >> 20} MB for each login; a login may use "
                          f"{HASH_MEMORY_MAX >> 20}")
    word = words[0] if words else ""
    if action == "mkdb":
        return pw_run(pw_mkdb, options, path, word)
    if not word and action != "list":
        pw_complain(f"{action}: whom? Give a login")
        return PW_FAILURE if action == "userdel" else PW_BAD_ARGUMENT               # Compat: do_userdel
    if word.startswith("#") or any(c in ":\r\n\0" for c in word):
        raise ConfigError("the login must not hold a colon or a line break, nor begin with #")
    code = pw_run({**PW_WRITERS, **PW_READERS}[action], options, path, os.fsencode(word))
    if options.mkdb and action in PW_WRITERS:
        code |= pw_run(pw_mkdb, options, path, "")
    return code


def tool_pw(argv: "list[str]") -> int:
    """pure-pw(8). The exit code: 0, or a PW_ constant."""
    try:
        options, words = options_parse(PW_ROWS, argv, "pw")
        action = words[0].lower() if words else ""
        if not options.help and action in (*PW_WRITERS, *PW_READERS, "mkdb"):
            return pw_action(options, action, words[1:])
    except ConfigError as error:
        pw_complain(str(error))
        return PW_BAD_ARGUMENT
    if action and not options.help:
        pw_complain(f"{words[0]}: there is no such action")
    print(options_help(PW_OPTIONS, PW_USAGE), end="")                               # Compat: no failure (main)
    return 0

# ==== quotacheck: pure-quotacheck =================================================================
# Counts what is in the directory of an account and writes its .ftpquota, when it got lost or somebody changed files
# behind the server's back. The tree belongs to somebody who may want to be counted short, or to have a file elsewhere
# counted, opened or chmod-ed by root, and who can change it meanwhile. So root enters the directory, makes it the
# root directory, and becomes the user for good, before anything in it is looked at. And, because an ordinary user
# cannot chroot and because a directory that is moved out of a chroot is a way out of it, no path is ever walked by
# the kernel: directories are opened by name relative to their parent's descriptor, with O_NOFOLLOW; links, which
# count as what they lead to if that is inside, are followed by WalkedTree. What was swapped meanwhile is opened as
# what it is now, or not at all.
#
# Counted: regular files and directories, once for every name; a directory that several names or links lead to once,
# told by device and inode, so that no loop lasts. Not counted: what is no file, any .ftpquota, and what the user may
# not see. What cannot be seen for another reason (no descriptors left, a disk error) ends the count: too low a number
# is not written.

QUOTACHECK_USAGE, QUOTACHECK_ACCOUNT, QUOTACHECK_ENTER, QUOTACHECK_WALK, QUOTACHECK_WRITE = 255, 254, 253, 252, 251
QUOTACHECK_DESCRIPTORS = 1 << 20        # wanted: one for every level of the tree
QUOTACHECK_PATH_MAX = 4096              # bytes: links further down are not followed, as in the original (PATH_MAX)
QUOTACHECK_PASSED = (errno.ENOENT, errno.ENOTDIR, errno.ELOOP, errno.EACCES, errno.EPERM, errno.ENAMETOOLONG)

# fmt: off
QUOTACHECK_OPTIONS = (
    Option("u", "User",      "user",      str,  None,  "The account, or uid, that the directory belongs to"),
    Option("g", "Group",     "group",     str,  None,  "The group, or gid, to count with [that of the account]"),
    Option("d", "Directory", "directory", str,  None,  "What to count: where the account is confined to"),
    Option("a", "All",       "database",  str,  None,  "Count for every user of this PureDB database"),
    Option("h", "Help",      "",          flag, False, "Show this help"),
)
# fmt: on


class QuotacheckError(Exception):
    """QuotacheckError(text, exit code)"""


class QuotacheckJob(NamedTuple):
    """What to count, and as who."""
    directory: bytes
    uid: int
    gid: int
    groups: "tuple[int, ...]"


class QuotaWalk:
    """A count of what is below the directory `root` (a descriptor), by and for the user `uid`."""

    def __init__(self, root: int, uid: int, proc: "int | None", host_path: bytes,
                 progress: "Callable[[int], None]") -> None:
        self.uid = uid
        self.proc = proc                        # /proc/self/fd, where there is one
        self.progress = progress                # told the number of files now and then
        self.tree = WalkedTree(root, host_path=host_path)
        self.files = self.size = 0
        self.seen: "set[tuple[int, int]]" = set()
        self.way: "list[tuple[int, bytes, list[tuple[str, bool]]]]" = []        # descriptor, name, (name, link?) to do

    def count(self) -> None:
        """Walk the whole tree. Raises OSError when it cannot be counted."""
        try:
            self.enter(os.open(".", os.O_RDONLY | os.O_DIRECTORY, dir_fd=self.tree.root), b"")
            self.files -= 1                     # the top itself
            while self.way:
                fd, _, todo = self.way[-1]
                if todo:
                    name, is_link = todo.pop()
                    try:
                        (self.follow if is_link else self.descend)(os.fsencode(name))
                    except OSError as error:
                        if error.errno not in QUOTACHECK_PASSED:
                            raise
                else:
                    self.way.pop()
                    os.close(fd)
        finally:
            for fd, *_ in self.way:
                os.close(fd)

    def descend(self, name: bytes) -> None:
        """Count the directory `name`."""
        at, flags = self.way[-1][0], os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW
        try:
            fd = os.open(name, flags, dir_fd=at)
        except PermissionError:
            self.unlock(at, name)
            fd = os.open(name, flags, dir_fd=at)
        self.enter(fd, name)

    def unlock(self, at: int, name: bytes) -> None:
        """Give the user's own directory r-x for its owner. Only O_PATH and /proc make this a way nobody can divert."""
        if self.proc is None:
            return
        fd = os.open(name, os.O_PATH | os.O_DIRECTORY | os.O_NOFOLLOW, dir_fd=at)
        try:
            st = os.fstat(fd)
            if st.st_uid == self.uid:
                os.chmod(str(fd), stat.S_IMODE(st.st_mode) | 0o500, dir_fd=self.proc)
        finally:
            os.close(fd)

    def follow(self, name: bytes) -> None:
        """Count what the link `name` leads to."""
        path = b"/".join([frame[1] for frame in self.way] + [name])
        if len(path) >= QUOTACHECK_PATH_MAX:
            return
        st = self.tree.stat(path)
        if stat.S_ISREG(st.st_mode):
            self.files += 1
            self.size += st.st_size
        elif stat.S_ISDIR(st.st_mode):
            self.enter(self.tree.open(path, os.O_RDONLY | os.O_DIRECTORY), name)

    def enter(self, fd: int, name: bytes) -> None:
        """Count the directory `fd`, which is closed in the end, and the files in it; the rest is left to do."""
        st = os.fstat(fd)
        if (st.st_dev, st.st_ino) in self.seen:
            os.close(fd)
            return
        self.seen.add((st.st_dev, st.st_ino))
        todo: "list[tuple[str, bool]]" = []
        self.way.append((fd, name, todo))
        if st.st_mode & 0o500 != 0o500 and st.st_uid == self.uid:
            os.fchmod(fd, stat.S_IMODE(st.st_mode) | 0o500)
        files, size = 1, 0
        with os.scandir(fd) as entries:
            for entry in entries:
                if entry.name == ".ftpquota":
                    continue
                if entry.is_file(follow_symlinks=False):
                    try:
                        size += entry.stat(follow_symlinks=False).st_size
                        files += 1
                    except OSError as error:
                        if error.errno not in QUOTACHECK_PASSED:
                            raise
                elif entry.is_symlink():
                    todo.append((entry.name, True))
                elif entry.is_dir(follow_symlinks=False):
                    todo.append((entry.name, False))
        self.files += files
        self.size += size
        self.progress(self.files)


# ---- the steps of one count ----------------------------------------------------------------------


def quotacheck_enter(job: QuotacheckJob) -> int:
    """A descriptor of the directory: for root, which is not root any more, the root directory. Raises OSError."""
    root = os.open(job.directory, os.O_RDONLY | os.O_DIRECTORY)
    os.fchdir(root)
    if os.geteuid() == 0:
        os.chroot(".")
        user_for_good(job.uid, job.gid, job.groups)
        os.chdir("/")                           # may the user be here at all
    elif os.fstat(root).st_uid != job.uid:
        raise OSError(errno.EPERM, "it belongs to somebody else, for which root is needed")
    return root


def quotacheck_write(root: int, uid: int, files: int, size: int) -> None:
    """Write .ftpquota in the directory `root`. Raises OSError."""
    st = os.fstat(root)
    if st.st_mode & 0o700 != 0o700 and st.st_uid == uid:
        os.fchmod(root, stat.S_IMODE(st.st_mode) | 0o700)
    flags = os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_NOCTTY
    fd = os.open(QUOTA_FILE, flags, 0o600, dir_fd=root)
    try:
        if not stat.S_ISREG(os.fstat(fd).st_mode):
            raise OSError(errno.EINVAL, "it is not a regular file")
        quota_lock(fd)
        quota_store(fd, files, size, os.fstat(fd).st_size)
    finally:
        os.close(fd)


def quotacheck_descriptors() -> None:
    """Allow this process as many open files as there are."""
    import resource
    _, most = resource.getrlimit(resource.RLIMIT_NOFILE)
    for wanted in (QUOTACHECK_DESCRIPTORS, most):
        try:
            resource.setrlimit(resource.RLIMIT_NOFILE, (wanted, max(wanted, most)))
            return
        except (OSError, ValueError):
            continue


def quotacheck_run(job: QuotacheckJob, progress: "Callable[[int], None]") -> None:
    """Count one account; the process belongs to it afterwards. Raises QuotacheckError."""
    import fcntl  # noqa: F401
    quotacheck_descriptors()
    shown = printable(job.directory)
    host_path = b"" if os.geteuid() == 0 else os.path.realpath(job.directory)
    proc = None
    if hasattr(os, "O_PATH") and os.path.isdir("/proc/self/fd"):
        proc = os.open("/proc/self/fd", os.O_RDONLY | os.O_DIRECTORY)
    try:
        root = quotacheck_enter(job)
    except OSError as error:
        raise QuotacheckError(f"cannot enter [{shown}] as uid {job.uid}, gid {job.gid}: {error.strerror}",
                              QUOTACHECK_ENTER) from None
    try:
        walk = QuotaWalk(root, job.uid, proc, host_path, progress)
        walk.count()
    except OSError as error:
        raise QuotacheckError(f"cannot walk through [{shown}]: {error.strerror}", QUOTACHECK_WALK) from None
    try:
        quotacheck_write(root, job.uid, walk.files, walk.size)
    except OSError as error:
        raise QuotacheckError(f"cannot write [{shown}/.ftpquota]: {error.strerror}", QUOTACHECK_WRITE) from None


def quotacheck_child(job: QuotacheckJob, progress: "Callable[[int], None]") -> int:
    """The exit code of quotacheck_run() in a process of its own, which says itself what went wrong."""
    sys.stdout.flush()
    child = os.fork()
    if child == 0:
        code = QUOTACHECK_WALK
        try:
            quotacheck_run(job, progress)
            code = 0
        except QuotacheckError as error:
            quotacheck_complain(error.args[0])
            code = error.args[1]
        finally:
            os._exit(code)
    _, status = os.waitpid(child, 0)
    return os.WEXITSTATUS(status) if os.WIFEXITED(status) else QUOTACHECK_WALK


# ---- what to count -------------------------------------------------------------------------------


def quotacheck_number(text: str) -> int:
    """A uid or gid; 0, which is none, for what is no number."""
    return int(text) if text.isascii() and text.isdigit() and int(text) < 0xFFFFFFFF else 0


def quotacheck_job(options: Options) -> QuotacheckJob:
    """What -u, -g and -d ask for. Raises QuotacheckError."""
    import grp
    import pwd
    uid, gid, account = os.geteuid(), os.getegid(), None
    if options.user is not None:
        try:
            account = pwd.getpwnam(options.user)
            uid, gid = account.pw_uid, account.pw_gid if os.geteuid() == 0 else gid
        except KeyError:
            uid = quotacheck_number(options.user)
    if options.group is not None:
        try:
            gid = grp.getgrnam(options.group).gr_gid
        except KeyError:
            gid = quotacheck_number(options.group)
    for kind, number in (("u", uid), ("g", gid)):
        if number == 0:
            raise QuotacheckError(f"-{kind}: an account that exists, or its number, is needed, and root's never",
                                  QUOTACHECK_ACCOUNT)
    groups: "tuple[int, ...]" = ()
    if os.geteuid() == 0:
        try:
            groups = tuple(os.getgrouplist(account.pw_name if account else pwd.getpwuid(uid).pw_name, gid))
        except KeyError:                        # Compat: doinitsupgroups; --all can do without an account
            raise QuotacheckError(f"-u {uid}: no account has this number", QUOTACHECK_ENTER) from None
    elif uid != os.geteuid():
        raise QuotacheckError(f"only root can count for others: uid {uid} is not yours", QUOTACHECK_ENTER)
    return QuotacheckJob(os.fsencode(options.directory), uid, gid, groups)


def quotacheck_users(path: str) -> "list[tuple[bytes, bytes]]":
    """The (login, rest of the line) of every user of a database, in its order. Raises PureDBError."""
    with PureDB(path) as database:
        offsets = []
        for low_byte in range(256):
            start, count = database.bucket(low_byte)
            offsets += [database.words(start + 8 * slot, 2)[1] for slot in range(count)]
        users: "dict[bytes, bytes]" = {}
        for offset in sorted(offsets):
            users.setdefault(*database.record(offset))      # the first one of a name is the one that counts
    return list(users.items())


def quotacheck_all(path: str) -> int:
    """Count for every user of a database: the exit code of the first that failed, or 0."""
    try:
        users = quotacheck_users(path)
    except PureDBError as error:
        raise QuotacheckError(str(error), QUOTACHECK_USAGE) from None
    result = 0
    for number, (login, value) in enumerate(users, 1):
        progress = quotacheck_progress(f"{number}/{len(users)} {printable(login)}: ")
        try:
            entry = passwd_entry(login + b":" + value)
        except ValueError as error:
            quotacheck_complain(f"user [{printable(login)}]: {error}")
            result = result or QUOTACHECK_ACCOUNT
            continue
        progress(0)
        directory = entry.home.partition(b"/./")[0] or b"/"
        code = quotacheck_child(QuotacheckJob(directory, entry.uid, entry.gid, (entry.gid,)), progress)
        result = result or code
    return result


def quotacheck_progress(label: str) -> "Callable[[int], None]":
    """What shows how far a count has come, on a terminal, now and then."""
    shown = 0.0

    def show(files: int) -> None:
        nonlocal shown
        now = time.monotonic()
        if now > shown + 0.2:
            shown = now
            print(f"\r{label}{files} files\x1b[K\r", end="", file=sys.stderr, flush=True)
    return show if sys.stderr.isatty() else lambda files: None


def quotacheck_complain(text: str) -> None:
    print(f"pure-quotacheck: {text}" + "\x1b[K" * sys.stderr.isatty(), file=sys.stderr, flush=True)


def tool_quotacheck(argv: "list[str]") -> int:
    """pure-quotacheck(8). Exit codes: 0, or a QUOTACHECK_ constant."""
    usage = "quotacheck -u user -d directory [-g group], or quotacheck --all database: write an account's .ftpquota"
    try:
        given, rest = options_given(QUOTACHECK_OPTIONS, argv, "quotacheck")
        options = options_merge(QUOTACHECK_OPTIONS, given)
    except ConfigError as error:
        quotacheck_complain(str(error))
        argv = []
    if not argv or options.help:
        print(options_help(QUOTACHECK_OPTIONS, usage), end="")
        return 0                                # Compat: no failure, a wrong option neither
    try:
        for row in QUOTACHECK_OPTIONS[1:]:
            if sum(g.row is row for g in given) > 1:
                raise QuotacheckError(f"-{row.short} was given twice", QUOTACHECK_USAGE)
        single = (options.directory, options.user, options.group)
        if rest or (options.directory is None if options.all is None else any(single)):
            raise QuotacheckError("either -d with -u, or --all alone is needed", QUOTACHECK_USAGE)
        if options.all is not None:
            if os.geteuid():
                raise QuotacheckError("only root can count for others", QUOTACHECK_ENTER)
            return quotacheck_all(options.all)
        if os.geteuid():
            quotacheck_complain(f"not root: counting without chroot, as uid {os.geteuid()}")
        quotacheck_run(quotacheck_job(options), quotacheck_progress(""))
    except QuotacheckError as error:
        quotacheck_complain(error.args[0])
        return error.args[1]
    return 0

# ==== ftpwho ======================================================================================
# pure-ftpwho(8): the sessions on the scoreboard, as a table for people (the default, -v, -w), as one line each for
# shells (-s), and as XML, plist, JSON or Prometheus metrics. Each form is a function from the sessions to text, found
# in FTPWHO_FORMS by the option that asks for it; the last one given wins. Rates are averages from a transfer's start.
#
# Names come from clients and from the name service. Every form escapes them in its own way; people see control
# characters, and bytes that are no UTF-8, as \xNN. The lines and fields of the original's forms are the original's.
# Compat: XML and plist are UTF-8 and escape quotes, so they are well-formed whatever a file is called; -c is a whole
# page, as pure-ftpwho(8) says; the HTML page is our own; sessions are sorted, oldest first.

FTPWHO_STATES = {SCOREBOARD_IDLE: "IDLE", SCOREBOARD_DOWNLOAD: " DL ", SCOREBOARD_UPLOAD: " UL "}
FTPWHO_WORDS = {SCOREBOARD_IDLE: "idle", SCOREBOARD_DOWNLOAD: "download", SCOREBOARD_UPLOAD: "upload"}
FTPWHO_RESOLVE_FOR = 5.0            # seconds that looking up host names may take in all

# fmt: off
FTPWHO_OPTIONS = (
    Option("c", "CGI",         "",    flag, False, "Write an HTML page for CGI [when GATEWAY_INTERFACE is set]"),
    Option("h", "Help",        "",    flag, False, "Show this help and exit"),
    Option("H", "DontResolve", "",    flag, False, "Show addresses instead of host names (faster)"),
    Option("n", "Numeric",     "",    flag, False, "The same as -H"),
    Option("p", "Plist",       "",    flag, False, "Write a property list"),
    Option("s", "Shell",       "",    flag, False, "Write pid|account|time|state|file|peer|local|port|KB|of KB|%|KB/s"),
    Option("v", "Verbose",     "",    flag, False, "Write the table with sizes and the server's addresses"),
    Option("w", "Web",         "",    flag, False, "Write an HTML page"),
    Option("W", "Embedded",    "",    flag, False, "Write the inside of an HTML page"),
    Option("x", "XML",         "",    flag, False, "Write XML"),
    Option("",  "JSON",        "",    flag, False, "Write JSON (addresses, no host names)"),
    Option("",  "Prometheus",  "",    flag, False, "Write metrics in Prometheus' text format"),
    Option("",  "StateDir",    "dir", str,  None,  "The server's StateDir [the one it uses by default]"),
)
# fmt: on


class FtpwhoSession(NamedTuple):
    """A ScoreboardRecord as people want it; sizes are 0 unless a transfer is under way."""

    record: ScoreboardRecord
    age: int                        # seconds since the session began
    peer: str                       # host name or address of the client
    local: str                      # of the server
    restart: int                    # bytes, as the next two
    total: int                      # downloads only
    current: int
    percent: int                    # of total; 0 when that is not known
    rate: int                       # bytes/s since the transfer's start

    @property
    def state(self) -> str:
        return FTPWHO_STATES.get(self.record.state, "ERR!")

    @property
    def word(self) -> str:
        return FTPWHO_WORDS.get(self.record.state, "unknown")


def ftpwho_session(record: ScoreboardRecord, now: float, host: "Callable[[str], str]") -> FtpwhoSession:
    """What is shown of `record` at time `now`; `host` names an address."""
    moving = record.state in (SCOREBOARD_DOWNLOAD, SCOREBOARD_UPLOAD)
    current = record.current if moving else 0
    total = record.total if record.state == SCOREBOARD_DOWNLOAD else 0
    restart = record.restart if record.restart <= record.current else 0
    percent = min(100, (200 * current + total) // (2 * total)) if current and total else 0
    seconds = int(now) - record.started if record.started else 0
    rate = (current - restart) // seconds if seconds > 0 and current > restart else 0
    return FtpwhoSession(record, max(0, int(now) - record.since), host(record.peer[0]), host(record.local[0]), restart,
                         total, current, percent, rate)


class FtpwhoHosts:
    """Names of addresses, each looked up once, and none after `limit` seconds of that."""

    def __init__(self, numeric: bool, limit: float = FTPWHO_RESOLVE_FOR):
        self.numeric = numeric
        self.deadline = time.monotonic() + limit
        self.names = {"": "?"}

    def __call__(self, address: str) -> str:
        if address not in self.names:
            self.names[address] = address if self.numeric or time.monotonic() > self.deadline else self.look_up(address)
        return self.names[address]

    @staticmethod
    def look_up(address: str) -> str:
        try:
            return socket.getnameinfo((address, 0), 0)[0]
        except OSError:
            return address


# ---- the original's forms ------------------------------------------------------------------------

FTPWHO_RULE = "+------+---------+-------+------+-------------------------------------------+\n"


def ftpwho_text(sessions: "list[FtpwhoSession]", title: str = "                 File/IP                   ",
                line: "Callable[[FtpwhoSession], str] | None" = None) -> str:
    """The table, two lines for a session."""
    lines = "".join((line or ftpwho_text_lines)(s) + FTPWHO_RULE for s in sessions)
    return "\n" + FTPWHO_RULE + f"| PID  |  Login  |For/Spd| What |{title}|\n" + FTPWHO_RULE + lines + "\n"


def ftpwho_verbose(sessions: "list[FtpwhoSession]") -> str:
    """The table, three or four lines for a session."""
    return ftpwho_text(sessions, "     File/Remote IP/Size(Kb)/Local IP      ", ftpwho_verbose_lines)


def ftpwho_text_lines(s: FtpwhoSession) -> str:
    age = f"{s.age // 3600:02d}:{s.age // 60 % 60:02d}"
    percent = f" {s.percent:3d}% " if s.percent and s.current > s.restart else "  ''  "
    return (f"|{s.record.pid:5d} | {printable(s.record.account):8}| {age} | {s.state} | "
            f"{printable(s.record.filename):42}|\n"
            f"|  ''  |    ''   |{ftpwho_short_rate(s.rate)}|{percent}| ->{s.peer:>39.39} |\n")


def ftpwho_verbose_lines(s: FtpwhoSession) -> str:
    lines = ftpwho_text_lines(s)
    ditto = "|  ''  |    ''   |       |      | "
    if s.current and s.total:
        lines += ditto + f"Total size:{s.total // 1024:9d} Transferred:{s.current // 1024:9d} |\n"
    elif s.current:
        lines += ditto + f"Transferred: {s.current // 1024:<29d} |\n"
    return lines + ditto + f"<-{s.local:>33.33}:{s.record.local[1]:<5d} |\n"


def ftpwho_short_rate(rate: int) -> str:
    """`rate` in seven columns."""
    for unit in "bKMG":
        if 0 < rate < 1024:
            return f"{rate:4d}{unit}/s"
        rate //= 1024
    return "   ''  "


def ftpwho_shell(sessions: "list[FtpwhoSession]") -> bytes:
    """One line for each session, its fields between bars; bytes as they are, but control bytes become _."""
    def escape(text: bytes) -> bytes:
        text = bytes(95 if c < 32 or c == 127 else c for c in text)
        return text.replace(b"\\", b"\\\\").replace(b"|", b"\\|")
    return b"".join(b"%d|%b|%d|%b|%b|%b|%b|%d|%d|%d|%d|%d\n" % (
        s.record.pid, escape(s.record.account), s.age, s.state.encode(), escape(s.record.filename),
        escape(s.peer.encode()), escape(s.local.encode()), s.record.local[1], s.current // 1024, s.total // 1024,
        s.percent, s.rate // 1024) for s in sessions)


def ftpwho_fields(s: FtpwhoSession) -> "list[tuple[str, str]]":
    """The (name, value) pairs of a session in XML and plist, those of a transfer only while there is one."""
    pairs = [("pid", s.record.pid), ("account", printable(s.record.account)), ("time", s.age), ("state", s.state),
             ("file", printable(s.record.filename)), ("host", s.peer), ("localhost", s.local),
             ("localport", s.record.local[1])]
    if s.current:
        pairs += [("resume", s.restart), ("current_size", s.current)]
        if s.total:
            pairs += [("total_size", s.total), ("percentage", s.percent)]
        pairs.append(("bandwidth", s.rate))
    return [(name, str(value)) for name, value in pairs]


def ftpwho_xml(sessions: "list[FtpwhoSession]") -> str:
    from html import escape
    lines = ["  <client" + "".join(f' {name}="{escape(value)}"' for name, value in ftpwho_fields(s)) + " />\n"
             for s in sessions]
    return '<?xml version="1.0" encoding="UTF-8"?>\n<status>\n' + "".join(lines) + "</status>\n"


def ftpwho_plist(sessions: "list[FtpwhoSession]") -> str:
    """A property list; sizes that are not known are there, but empty, when nothing is transferred."""
    from html import escape
    text = ('<?xml version="1.0" encoding="UTF-8"?>\n<!DOCTYPE plist PUBLIC "-//Apple Computer//DTD PLIST 1.0//EN" '
            '"http://www.apple.com/DTDs/PropertyList-1.0.dtd">\n<plist version="1.0">\n<dict>\n'
            "\t<key>user-info</key>\n\t<array>\n")
    for s in sessions:
        pairs = ftpwho_fields(s)
        if not s.current:
            pairs += [(name, "") for name in ("resume", "current_size", "total_size", "percentage", "bandwidth")]
        text += "\t\t<dict>\n" + "".join(
            f"\t\t\t<key>{name}</key>\n\t\t\t<string>{escape(value, quote=False)}</string>\n"
            for name, value in pairs) + "\t\t</dict>\n"
    return text + "\t</array>\n</dict>\n</plist>\n"


# ---- for programs --------------------------------------------------------------------------------


def ftpwho_json(sessions: "list[FtpwhoSession]") -> str:
    """{"sessions": [...]}; names that are no UTF-8 have \\xNN in them."""
    import json
    return json.dumps({"sessions": [{
        "pid": s.record.pid, "account": s.record.account.decode("utf-8", "backslashreplace"), "state": s.word,
        "seconds": s.age, "file": s.record.filename.decode("utf-8", "backslashreplace"),
        "peer": s.record.peer[0], "peer_port": s.record.peer[1],
        "local": s.record.local[0], "local_port": s.record.local[1],
        "restart": s.restart if s.current else 0, "bytes": s.current, "total_bytes": s.total or None,
        "percent": s.percent if s.total else None, "bytes_per_second": s.rate} for s in sessions]}, indent=1) + "\n"


def ftpwho_prometheus(sessions: "list[FtpwhoSession]") -> str:
    """The metrics of a scrape: https://prometheus.io/docs/instrumenting/exposition_formats/"""
    def metric(name: str, about: str, label: str, values: "dict[str, int]") -> str:
        lines = [f"# HELP pureftpd_{name} {about}\n# TYPE pureftpd_{name} gauge\n"]
        for key, value in sorted(values.items()):
            key = key.replace("\\", "\\\\").replace('"', '\\"').replace("\n", "\\n")
            lines.append(f'pureftpd_{name}{{{label}="{key}"}} {value}\n')
        return "".join(lines)
    states = dict.fromkeys(FTPWHO_WORDS.values(), 0)
    accounts: dict[str, int] = {}
    moved, rates = {"download": 0, "upload": 0}, {"download": 0, "upload": 0}
    for s in sessions:
        account = printable(s.record.account)
        accounts[account] = accounts.get(account, 0) + 1
        states[s.word] = states.get(s.word, 0) + 1
        if s.word in moved:
            moved[s.word] += s.current - s.restart
            rates[s.word] += s.rate
    return (metric("sessions", "Sessions by what they do.", "state", states)
            + metric("account_sessions", "Sessions by account.", "account", accounts)
            + metric("transfer_bytes", "Bytes moved by the transfers under way.", "direction", moved)
            + metric("transfer_bytes_per_second", "Average rate of the transfers under way.", "direction", rates))


# ---- for the web ---------------------------------------------------------------------------------

FTPWHO_PAGE = """<!DOCTYPE html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta name="color-scheme" content="light dark">
<meta http-equiv="Content-Security-Policy" content="default-src 'none'; style-src 'unsafe-inline'">
<title>%(title)s</title>
<style>
:root { color-scheme: light dark; --page: #f4f5f7; --card: #fff; --text: #1b1f24; --soft: #57606a; --line: #d8dee4;
  --idle: #57606a; --down: #0a5cc2; --up: #1a7f37; --track: #e2e6ea; }
@media (prefers-color-scheme: dark) {
  :root { --page: #0f1318; --card: #181d24; --text: #e6eaef; --soft: #9aa5b1; --line: #2c343d;
    --idle: #9aa5b1; --down: #6cb0ff; --up: #5fd07f; --track: #2c343d; } }
body { margin: 0; padding: clamp(1rem, 3vw, 2.5rem); background: var(--page); color: var(--text);
  font: 1rem/1.5 system-ui, sans-serif; }
h1 { margin: 0; font-size: 1.5rem; }
.ftpwho-sum { margin: .25rem 0 1.25rem; color: var(--soft); }
.ftpwho-box { overflow-x: auto; background: var(--card); border: 1px solid var(--line); border-radius: .6rem; }
table { width: 100%%; border-collapse: collapse; font-variant-numeric: tabular-nums; }
caption { position: absolute; width: 1px; height: 1px; overflow: hidden; clip-path: inset(50%%); }
th, td { padding: .6rem .9rem; text-align: left; vertical-align: top; border-top: 1px solid var(--line); }
thead th { border: 0; color: var(--soft); font-size: .85rem; font-weight: 600; white-space: nowrap; }
tbody th { font-weight: 600; overflow-wrap: anywhere; min-width: 6rem; }
.n { text-align: right; white-space: nowrap; }
.f { min-width: 11rem; overflow-wrap: anywhere; }
.p { min-width: 9rem; }
.s { white-space: nowrap; font-weight: 600; color: var(--idle); }
.s.download { color: var(--down); }
.s.upload { color: var(--up); }
small { display: block; color: var(--soft); font-size: .85rem; }
progress { display: block; appearance: none; width: 100%%; height: .5rem; margin: .5rem 0 .35rem; border: 0;
  border-radius: 1rem; overflow: hidden; background: var(--track); }
progress::-webkit-progress-bar { background: var(--track); }
progress::-webkit-progress-value { background: var(--down); }
progress::-moz-progress-bar { background: var(--down); }
.none { padding: 2.5rem; text-align: center; color: var(--soft); }
</style>
</head>
<body>
<main>
<h1>%(title)s</h1>
%(inside)s</main>
</body>
</html>
"""
FTPWHO_DOT = " \N{MIDDLE DOT} "
FTPWHO_COLUMNS = ('<tr><th scope="col">Account</th><th scope="col">State</th><th scope="col">File</th>'
                  '<th scope="col">Progress</th><th scope="col">Client and server</th>'
                  '<th scope="col" class="n">Connected</th></tr>')


def ftpwho_web(sessions: "list[FtpwhoSession]") -> str:
    """A whole HTML page. It needs nothing from anywhere else."""
    return FTPWHO_PAGE % {"title": "FTP server status", "inside": ftpwho_embedded(sessions)}


def ftpwho_embedded(sessions: "list[FtpwhoSession]") -> str:
    """The inside of the page; the surrounding one may style .ftpwho."""
    rates = {word: sum(s.rate for s in sessions if s.word == word) for word in ("download", "upload")}
    counts = {word: sum(s.word == word for s in sessions) for word in rates}
    plural = "session" if len(sessions) == 1 else "sessions"
    summary = [f"{len(sessions)} {plural}"]
    summary += [f"{counts[word]} {word}ing ({ftpwho_size(rates[word])}/s)" for word in rates]
    lines = ['<div class="ftpwho">', f'<p class="ftpwho-sum">{FTPWHO_DOT.join(summary)}</p>']
    lines.append('<div class="ftpwho-box" role="region" aria-label="Sessions" tabindex="0">')
    if sessions:
        lines += ["<table>", "<caption>Sessions, oldest first</caption>", "<thead>", FTPWHO_COLUMNS, "</thead>",
                  "<tbody>", *(ftpwho_web_row(s) for s in sessions), "</tbody>", "</table>"]
    else:
        lines.append('<p class="none">Nobody is logged in.</p>')
    return "\n".join(lines) + "\n</div>\n</div>\n"


def ftpwho_web_row(s: FtpwhoSession) -> str:
    from html import escape
    age = f"{s.age // 3600}:{s.age // 60 % 60:02d}:{s.age % 60:02d}"
    return (f'<tr><th scope="row">{escape(printable(s.record.account))}</th>'
            f'<td class="s {s.word}">{s.word.capitalize()}</td>'
            f'<td class="f">{escape(printable(s.record.filename))}</td>'
            f'<td class="p">{ftpwho_web_progress(s)}</td>'
            f'<td>{escape(s.peer)}<small>to {escape(s.local)} port {s.record.local[1]}</small></td>'
            f'<td class="n"><time datetime="PT{s.age}S">{age}</time><small>process {s.record.pid}</small></td></tr>')


def ftpwho_web_progress(s: FtpwhoSession) -> str:
    """How far the transfer is, and how fast; empty without one."""
    if not s.current:
        return ""
    rate = f"{FTPWHO_DOT}{ftpwho_size(s.rate)}/s" if s.rate else ""
    if not s.total:
        return f"{ftpwho_size(s.current)}<small>so far{rate}</small>"
    return (f'<progress max="100" value="{s.percent}" aria-label="Progress">{s.percent}%</progress>'
            f"{s.percent}% of {ftpwho_size(s.total)}<small>{ftpwho_size(s.current)}{rate}</small>")


def ftpwho_size(size: float) -> str:
    """`size` bytes with three digits and a unit (IEC prefixes)."""
    units = deque(("B", "KiB", "MiB", "GiB", "TiB"))
    while size >= 1000 and len(units) > 1:
        size /= 1024
        units.popleft()
    return f"{size:.{0 if units[0] == 'B' or size >= 99.95 else 1}f} {units[0]}"


# ---- the tool ------------------------------------------------------------------------------------

# fmt: off
FTPWHO_FORMS: dict[str, Callable[[list[FtpwhoSession]], Any]] = {
    "verbose":    ftpwho_verbose,
    "shell":      ftpwho_shell,
    "plist":      ftpwho_plist,
    "xml":        ftpwho_xml,
    "web":        ftpwho_web,
    "cgi":        ftpwho_web,
    "embedded":   ftpwho_embedded,
    "json":       ftpwho_json,
    "prometheus": ftpwho_prometheus,
}
# fmt: on


def tool_ftpwho(argv: "list[str]") -> int:
    """pure-ftpwho(8). Exit codes: 0, 1 refused or wrong options, 255 no such StateDir."""
    statedir = statedir_default()
    try:
        given, rest = options_given(FTPWHO_OPTIONS, argv, "ftpwho")
        options = options_merge(FTPWHO_OPTIONS, given)
        if options.help:
            print(options_help(FTPWHO_OPTIONS, "ftpwho [options]: show who is logged in to the FTP server"), end="")
            return 0
        if rest:
            raise ConfigError(f"{rest[0]}: ftpwho takes no arguments")
        statedir = options.statedir or statedir
        records = scoreboard_read(statedir)
    except ConfigError as error:
        print(f"pure-ftpwho: {error}", file=sys.stderr)
        return 1 if os.path.isdir(statedir) else 255
    cgi = options.cgi or "GATEWAY_INTERFACE" in os.environ
    form = next((g.row.long for g in reversed(given) if g.row.long in FTPWHO_FORMS), "cgi" if cgi else "text")
    numeric = options.numeric or options.dontresolve or form in ("json", "prometheus")
    hosts = FtpwhoHosts(numeric)
    output = FTPWHO_FORMS.get(form, ftpwho_text)([ftpwho_session(r, time.time(), hosts) for r in records])
    if cgi and form in ("cgi", "web", "embedded"):
        output = "Content-Type: text/html; charset=utf-8\nCache-Control: no-store\n\n" + output
    sys.stdout.buffer.write(output if isinstance(output, bytes) else output.encode("utf-8", "replace"))
    sys.stdout.buffer.flush()
    return 0

# ==== uploadscript ================================================================================
# pure-uploadscript(8): takes announcements from the upload pipe and runs a program for each, with the path as its only
# argument. Two processes: the supervisor stays what it was started as, opens the pipe, and reads nothing from it; the
# worker becomes -u and -g for good before it reads the first byte, and runs the programs. When the pipe is replaced
# (StateDir was removed while the daemon was down) the supervisor opens the new one for a new worker.
#
# A session could be made to announce any path, so only what is a regular file (lstat) is passed on. Programs run one
# after the other, in the order of the uploads. Compat: the original waits for each for ever, so that one that hangs
# stops all others; here it is waited for --timeout seconds, then left to itself, UPLOADSCRIPT_LATE of them at most:
# for one more, the oldest is killed. --timeout 0 is the original's way.

UPLOADSCRIPT_PATIENCE = 30          # seconds to wait for the pipe at the start
UPLOADSCRIPT_LATE = 8               # programs past their time that may be running

# fmt: off
UPLOADSCRIPT_OPTIONS = (
    Option("B", "Daemonize", "",        flag,     False, "Run in the background"),
    Option("g", "GID",       "gid",     whole(0), None,  "Run the program with this group [the primary group of -u]"),
    Option("h", "Help",      "",        flag,     False, "Show this help and exit"),
    Option("p", "PidFile",   "file",    str,      None,  "Write the process id there [/var/run/pure-uploadscript.pid]"),
    Option("r", "Run",       "program", str,      None,  "The program to run for each upload (an absolute path)"),
    Option("u", "UID",       "uid",     whole(0), None,  "Run the program as this user [the one who started this]"),
    Option("",  "StateDir",  "dir",     str,      None,  "The server's StateDir [the one it uses by default]"),
    Option("",  "Timeout",   "seconds", whole(0), 60,    "How long a program may hold up the next; 0: for ever [60]"),
)
# fmt: on


class UploadscriptPlan(NamedTuple):
    """What the command line asks for, checked."""

    statedir: str
    program: bytes
    pidfile: str
    identity: "tuple[int, int] | None"      # (uid, gid) to become
    timeout: "int | None"                   # seconds
    background: bool


def uploadscript_plan(options: Options) -> UploadscriptPlan:
    """The plan of `options`. ConfigError: no such program or user, or not root."""
    if not options.run or not options.run.startswith("/") or not os.access(options.run, os.X_OK):
        raise ConfigError(f"-r {options.run or ''}: name a program that can be run, with its absolute path")
    statedir = os.path.abspath(options.statedir or statedir_default())
    at_default = not options.statedir and os.geteuid() == 0
    pidfile = ("/var/run" if at_default else statedir) + "/pure-uploadscript.pid"
    return UploadscriptPlan(statedir, os.fsencode(options.run), os.path.abspath(options.pidfile or pidfile),
                            tool_identity(options.uid, options.gid), options.timeout or None, options.daemonize)


# ---- the worker ----------------------------------------------------------------------------------


def uploadscript_environment(message: UploadMessage, found: os.stat_result) -> "dict[bytes, bytes]":
    """Ours, and what pure-uploadscript(8) says about the file; names that are not known are left out."""
    import grp
    import pwd
    facts = [("SIZE", str(found.st_size)), ("PERMS", f"{stat.S_IMODE(found.st_mode):o}"),
             ("UID", str(found.st_uid)), ("GID", str(found.st_gid))]
    try:
        facts.append(("USER", pwd.getpwuid(found.st_uid).pw_name))
    except KeyError:
        pass
    try:
        facts.append(("GROUP", grp.getgrgid(found.st_gid).gr_name))
    except KeyError:
        pass
    environment = {b"UPLOAD_" + name.encode(): os.fsencode(value) for name, value in facts}
    if message.account:
        environment[b"UPLOAD_VUSER"] = message.account
    return {**os.environb, **environment}


def uploadscript_start(program: bytes, message: UploadMessage) -> Any:
    """The program started for `message`, as a Popen; None when there is no such regular file, or no program."""
    import subprocess
    try:
        found = os.lstat(message.path)
        if not stat.S_ISREG(found.st_mode):
            raise OSError(errno.EINVAL, "not a regular file")
        return subprocess.Popen(
            [program, message.path], env=uploadscript_environment(message, found), cwd="/", start_new_session=True,
            stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    except OSError as error:
        print(f"pure-uploadscript: nothing run for {printable(message.path)}: {error.strerror}", file=sys.stderr)
        return None


def uploadscript_run(program: bytes, message: UploadMessage, timeout: "float | None", late: "list[Any]") -> None:
    """Run the program and wait for it; one that is not done in time joins `late`."""
    import subprocess
    process = uploadscript_start(program, message)
    if process is None:
        return
    try:
        process.wait(timeout)
    except subprocess.TimeoutExpired:
        late.append(process)
    while len(late) > UPLOADSCRIPT_LATE:
        oldest = late.pop(0)
        if oldest.poll() is None:
            os.killpg(oldest.pid, signal.SIGKILL)
            oldest.wait()


def uploadscript_work(pipe: int, plan: UploadscriptPlan, supervisor: int) -> None:
    """The worker's life. It ends with its supervisor; SIGHUP: as soon as the pipe is empty."""
    import grp, pwd, subprocess  # noqa: E401,F401          # now: another user might not be able to read them
    ending = []
    signal.signal(signal.SIGHUP, lambda *_: ending.append(True))
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    os.chdir("/")
    if plan.identity:
        tool_become(*plan.identity)
    buffer = bytearray()
    late: list[Any] = []
    while os.getppid() == supervisor:
        message = uploadpipe_next(pipe, buffer, 0 if ending else 1)
        late[:] = [process for process in late if process.poll() is None]
        if message:
            uploadscript_run(plan.program, message, plan.timeout, late)
        elif ending:
            break


# ---- the supervisor ------------------------------------------------------------------------------


def uploadscript_fork(pipe: int, plan: UploadscriptPlan) -> int:
    """The pid of a new worker."""
    supervisor = os.getpid()
    pid = os.fork()
    if pid == 0:
        try:
            uploadscript_work(pipe, plan, supervisor)
            os._exit(0)
        except BaseException as error:
            print(f"pure-uploadscript: {type(error).__name__}: {error}", file=sys.stderr)
        finally:
            os._exit(1)
    return pid


def uploadscript_open(statedir: str, patience: float) -> int:
    """The pipe, waited for `patience` seconds. ConfigError: it did not appear, or is not to be trusted."""
    deadline = time.monotonic() + patience
    while True:
        try:
            return uploadpipe_reader(statedir)
        except ConfigError:
            if time.monotonic() > deadline or os.path.lexists(f"{statedir}/{UPLOADPIPE_NAME}"):
                raise
        time.sleep(0.2)


def uploadscript_replaced(statedir: str, pipe: int) -> bool:
    """Whether the pipe's name is now another pipe's."""
    try:
        found = os.lstat(f"{statedir}/{UPLOADPIPE_NAME}")
    except OSError:
        return False
    return not os.path.samestat(found, os.fstat(pipe))


def uploadscript_supervise(pipe: int, plan: UploadscriptPlan) -> None:
    """See to it that a worker reads the pipe, for ever. SystemExit ends it, and the worker."""
    worker = 0
    try:
        while True:
            worker = uploadscript_fork(pipe, plan)
            while not uploadscript_replaced(plan.statedir, pipe) and os.waitpid(worker, os.WNOHANG) == (0, 0):
                time.sleep(0.5)
            worker = uploadscript_retire(worker, signal.SIGHUP)
            if uploadscript_replaced(plan.statedir, pipe):
                os.close(pipe)
                pipe = uploadscript_open(plan.statedir, UPLOADSCRIPT_PATIENCE)
    finally:
        if worker:
            uploadscript_retire(worker, signal.SIGTERM)


def uploadscript_retire(worker: int, number: int) -> int:
    """Signal the worker and wait for its end, if it has not ended; 0."""
    try:
        os.kill(worker, number)
        os.waitpid(worker, 0)
    except (ProcessLookupError, ChildProcessError):
        pass
    return 0


def uploadscript_pidfile(path: str) -> None:
    """A new file with our pid; ConfigError. The old one goes first, so no link is followed."""
    try:
        if os.path.lexists(path):
            os.unlink(path)
        descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC, 0o644)
    except OSError as error:
        raise ConfigError(f"-p {path}: {error.strerror}") from None
    os.write(descriptor, b"%d\n" % os.getpid())
    os.close(descriptor)


def tool_uploadscript(argv: "list[str]") -> int:
    """pure-uploadscript(8). Exit codes: 0 stopped by a signal, or help; 255 errors."""
    try:
        options, rest = options_parse(UPLOADSCRIPT_OPTIONS, argv, "uploadscript")
        if options.help:
            usage = "uploadscript -r program [options]: run a program for each file that is uploaded"
            print(options_help(UPLOADSCRIPT_OPTIONS, usage), end="")
            return 0
        if rest:
            raise ConfigError(f"{rest[0]}: uploadscript takes no arguments")
        plan = uploadscript_plan(options)
        if plan.background:
            daemonize()
        for number in signal.SIGTERM, signal.SIGINT, signal.SIGHUP:
            signal.signal(number, lambda *_: sys.exit(0))
        pipe = uploadscript_open(plan.statedir, UPLOADSCRIPT_PATIENCE)
        uploadscript_pidfile(plan.pidfile)
    except ConfigError as error:
        print(f"pure-uploadscript: {error}", file=sys.stderr)
        return 255
    try:
        uploadscript_supervise(pipe, plan)
    except ConfigError as error:
        print(f"pure-uploadscript: {error}", file=sys.stderr)
    finally:
        try:
            os.unlink(plan.pidfile)
        except FileNotFoundError:
            pass
    return 255

# ==== authd: pure-authd ===========================================================================
# The other end of extauth: it listens on a Unix socket, and answers each request with what a program of the
# administrator's writes to its standard output. The program finds the request in its environment (pure-authd(8),
# README.Authentication-Modules). Each request has a process of its own, so that one that hangs does not keep the others
# waiting; after AUTHD_SECONDS it is killed with all that it started, and the answer is a refusal.
#
# What the client typed reaches a program, perhaps a shell script, as root: values that can be no address, port or host
# name refuse the request, and so do control characters anywhere.

AUTHD_SECONDS = 60.0                # for the program, as the original
AUTHD_REQUEST_SECONDS = 10.0        # for the request to arrive
AUTHD_MAX = 4095                    # bytes of a request, and of an answer
AUTHD_AT_ONCE = 16                  # programs running at the same time
AUTHD_PIDFILE = "/var/run/pure-authd.pid"
AUTHD_REFUSAL = b"auth_ok:-1\nend\n"
AUTHD_SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGQUIT, signal.SIGXCPU)
AUTHD_NAME = frozenset(b"abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ0123456789.:%_-")
AUTHD_TEXT = frozenset(range(256)) - frozenset(range(32)) - {127}


def parse_program(text: str) -> str:
    if not text.startswith("/"):
        raise ValueError("must be the absolute path of a program")
    return text


# fmt: off
AUTHD_OPTIONS = (
    Option("B", "Daemonize", "",       flag,                False, "Run in the background"),
    Option("g", "GID",       "gid",    whole(0, 2**32 - 2), None,  "Run with this group id [that of -u's account]"),
    Option("h", "Help",      "",       flag,                False, "Show this help and exit"),
    Option("p", "PIDFile",   "file",   parse_path,          None,  f"Where to write the process id [{AUTHD_PIDFILE}]"),
    Option("r", "Run",       "program", parse_program,      None,  "The program that knows the accounts"),
    Option("s", "Socket",    "socket", parse_path,          None,  "The Unix socket to listen on: -l extauth:SOCKET"),
    Option("u", "UID",       "uid",    whole(0, 2**32 - 2), None,  "Run with this user id"),
)
AUTHD_VARIABLES = {                 # key of a request: variable, bytes that its value may have
    b"account":   (b"AUTHD_ACCOUNT",         AUTHD_TEXT),
    b"password":  (b"AUTHD_PASSWORD",        AUTHD_TEXT),
    b"localhost": (b"AUTHD_LOCAL_IP",        AUTHD_NAME),
    b"localport": (b"AUTHD_LOCAL_PORT",      frozenset(b"0123456789")),
    b"peer":      (b"AUTHD_REMOTE_IP",       AUTHD_NAME),
    b"encrypted": (b"AUTHD_ENCRYPTED",       frozenset(b"01")),
    b"sni_name":  (b"AUTHD_CLIENT_SNI_NAME", AUTHD_NAME),
}
# fmt: on


class AuthdStop(Exception):
    """A signal asks for the end."""


def authd_complain(text: str) -> None:
    print("pure-authd: " + text, file=sys.stderr, flush=True)


def authd_environment(request: bytes) -> "dict[bytes, bytes]":
    """The variables of a request; those without a value are not set. Raises ValueError for what is no request."""
    lines = request.split(b"\n")
    if not any(line.startswith(b"end") for line in lines[:-1]):
        raise ValueError("a request without end")
    variables = {}
    for line in lines:
        key, colon, value = line.partition(b":")
        if not colon or key not in AUTHD_VARIABLES:
            continue
        name, allowed = AUTHD_VARIABLES[key]
        if not allowed.issuperset(value):
            raise ValueError(f"a request with impossible characters in {key.decode()}")
        if value:
            variables[name] = value
    return variables


def authd_request(connection: socket.socket) -> bytes:
    """One request, to its line `end` or as far as it comes."""
    request = b""
    while len(request) < AUTHD_MAX and b"\nend" not in request[:-1]:
        block = connection.recv(AUTHD_MAX - len(request))
        if not block:
            break
        request += block
    return request


def authd_start(program: str, variables: "dict[bytes, bytes]") -> "tuple[int, int]":
    """The program's process id, and a descriptor to read what it says. Raises OSError."""
    inherited = {name: value for name, value in os.environb.items() if not name.startswith(b"AUTHD_")}
    reader, writer = os.pipe()
    null = os.open(os.devnull, os.O_RDWR)
    try:
        ends = ((null, 0), (writer, 1), (null, 2))
        pid = os.posix_spawn(program, [program], {**inherited, **variables},
                             setsigdef=[signal.SIGPIPE, signal.SIGXFSZ],            # Python ignores them
                             file_actions=[(os.POSIX_SPAWN_DUP2, here, there) for here, there in ends])
    finally:
        os.close(writer)
        os.close(null)
    return pid, reader


def authd_answer(pid: int, reader: int) -> bytes:
    """All that the program says. Raises OSError when it is killed without a word.

    Compat: the original then answers nothing, too, which means "no such user, ask the next back end".
    """
    answer, block = b"", b"-"
    while block and len(answer) < AUTHD_MAX:
        block = os.read(reader, AUTHD_MAX - len(answer))
        answer += block
    if not answer and os.WIFSIGNALED(os.waitpid(pid, 0)[1]):
        raise OSError(errno.EPIPE, "it was killed")
    return answer


def authd_handle(connection: socket.socket, program: str, seconds: float) -> None:
    """Answer one request: with a refusal when the program cannot be run or takes more than `seconds`. OSError."""
    def late(number: int, frame: Any) -> None:
        raise TimeoutError(errno.ETIMEDOUT, "it took too long")

    signal.signal(signal.SIGALRM, late)
    signal.setitimer(signal.ITIMER_REAL, AUTHD_REQUEST_SECONDS)
    try:
        variables = authd_environment(authd_request(connection))
        signal.setitimer(signal.ITIMER_REAL, seconds)
        pid, reader = authd_start(program, variables)
        answer = authd_answer(pid, reader)
    except (OSError, ValueError) as error:
        authd_complain(f"{program}: {getattr(error, 'strerror', None) or error}")
        pid, answer = 0, AUTHD_REFUSAL
    signal.setitimer(signal.ITIMER_REAL, AUTHD_REQUEST_SECONDS)
    connection.sendall(answer)
    connection.close()
    if pid and answer:
        os.waitpid(pid, 0)                              # it may have more to do than to answer


def authd_fork(connection: socket.socket, listener: socket.socket, program: str, seconds: float) -> int:
    """The process that answers on `connection`, leader of a process group; at its end all that it started ends."""
    pid = os.fork()
    if pid:
        return pid
    try:
        os.setpgid(0, 0)
        for number in AUTHD_SIGNALS:
            signal.signal(number, signal.SIG_DFL)
        listener.close()
        authd_handle(connection, program, seconds)
    except OSError as error:
        authd_complain(f"{error.strerror or error}")
    finally:
        os.killpg(os.getpid(), signal.SIGKILL)
        os._exit(1)


def authd_reap(children: "set[int]", wait: bool) -> None:
    """Take the processes that have ended out of `children`; with `wait` at least one."""
    while children:
        pid, _ = os.waitpid(-1, 0 if wait else os.WNOHANG)
        if not pid:
            return
        children.discard(pid)
        wait = False


def authd_serve(listener: socket.socket, program: str, seconds: float = AUTHD_SECONDS) -> None:
    """Answer requests until AuthdStop; then nothing that was started is left."""
    children: "set[int]" = set()
    try:
        while True:
            authd_reap(children, len(children) >= AUTHD_AT_ONCE)
            listener.settimeout(1.0 if children else None)
            try:
                connection, _ = listener.accept()
            except OSError:
                continue                                # a time-out, or nobody there any more
            with connection:
                children.add(authd_fork(connection, listener, program, seconds))
    finally:
        for pid in children:
            try:
                os.killpg(pid, signal.SIGKILL)
            except ProcessLookupError:
                pass
        authd_reap(children, True)


def authd_listen(path: str) -> socket.socket:
    """A listening socket at `path`, mode 0600, in place of one that is there. Raises OSError."""
    try:
        if stat.S_ISSOCK(os.lstat(path).st_mode):
            os.unlink(path)
    except FileNotFoundError:
        pass
    listener = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    mask = os.umask(0o177)
    try:
        listener.bind(path)
        listener.listen(42)
    except OSError:
        listener.close()
        raise
    finally:
        os.umask(mask)
    return listener


def authd_pidfile(path: "str | None") -> str:
    """Write our process id; its file, "" when that is the usual one and it cannot be written. Raises OSError."""
    where = path or AUTHD_PIDFILE
    try:
        if os.path.lexists(where):
            os.unlink(where)
        fd = os.open(where, os.O_CREAT | os.O_WRONLY | os.O_EXCL | os.O_NOFOLLOW, 0o644)
    except OSError:
        if path:
            raise
        return ""
    os.write(fd, b"%d\n" % os.getpid())
    os.close(fd)
    return where


def authd_run(options: Options, identity: "tuple[int, int] | None") -> None:
    """Serve until a signal comes. Raises OSError when that cannot begin."""
    def stop(number: int, frame: Any) -> None:
        for number in AUTHD_SIGNALS:
            signal.signal(number, signal.SIG_IGN)
        raise AuthdStop

    pidfile, listener = "", authd_listen(options.socket)
    try:
        if options.daemonize:
            daemonize()
        for number in AUTHD_SIGNALS:
            signal.signal(number, stop)
        pidfile = authd_pidfile(options.pidfile)
        if identity:
            tool_become(*identity)
        os.chdir("/")
        authd_serve(listener, options.run)
    except AuthdStop:
        pass
    finally:
        listener.close()
        for path in filter(None, (options.socket, pidfile)):
            try:
                os.unlink(path)
            except OSError:
                pass                                    # whom -u names may not remove it; the next start does


def tool_authd(argv: "list[str]") -> int:
    """pure-authd(8). Exit codes: 0; 254 wrong options, 255 cannot serve. Compat: it need not be root."""
    try:
        options, rest = options_parse(AUTHD_OPTIONS, argv, "pure-authd")
        if options.help:
            print(options_help(AUTHD_OPTIONS, "pure-authd -s SOCKET -r PROGRAM: answer pure-ftpd's -l extauth"), end="")
            return 0
        if rest or not options.socket or not options.run:
            raise ConfigError("give -s /path/to/socket and -r /path/to/program, and nothing besides options")
        options.socket = os.path.abspath(options.socket)
        options.pidfile = options.pidfile and os.path.abspath(options.pidfile)
        identity = tool_identity(options.uid, options.gid)
    except ConfigError as error:
        authd_complain(str(error))
        return 254
    try:
        authd_run(options, identity)
    except OSError as error:
        authd_complain(f"{error.filename or options.socket}: {error.strerror or error}")
        return 255
    return 0

# ==== pwconvert: system users to virtual users ====================================================
# pure-pwconvert(8): a line of the file of virtual users for each system user who may log in: neither uid nor gid is
# 0, the home exists, and the shell is in /etc/shells or is "ftp". Password hashes come from shadow(5), for root only.

PWCONVERT_USAGE = """\
usage: pwconvert > pureftpd.passwd
Write the system's users as virtual users to standard output. Run as root, it copies their password hashes, too."""


def pwconvert_shells(path: str = "/etc/shells") -> "set[str]":
    """The shells that shells(5) lists, in the way of getusershell(3); "ftp" besides."""
    try:
        with open(path, encoding="utf-8", errors="surrogateescape") as file:
            lines = [line.partition("#")[0].strip() for line in file]
    except OSError:
        lines = ["/bin/sh", "/bin/csh"]
    return {line for line in lines if line.startswith("/")} | {"ftp"}


def pwconvert_shadow(path: str = "/etc/shadow") -> "dict[str, str]":
    """The hash of each user in shadow(5); nothing where it cannot be read."""
    try:
        with open(path, encoding="utf-8", errors="surrogateescape") as file:
            return dict(line.split(":")[:2] for line in file if ":" in line)
    except OSError:
        return {}


def pwconvert_line(user: Any, hashed: str, shells: "set[str]") -> "str | None":
    """The line of a user, an entry of passwd(5); None when the user is none for FTP."""
    gecos = user.pw_gecos.partition(",")[0]
    if user.pw_uid == 0 or user.pw_gid == 0 or not os.path.isdir(user.pw_dir):
        return None
    if (user.pw_shell if user.pw_shell.lower() != "ftp" else "ftp") not in shells:
        return None
    fields = [user.pw_name, hashed if hashed.startswith("$") else "*", str(user.pw_uid), str(user.pw_gid), gecos,
              user.pw_dir + "/./"]
    if any(c in ":\r\n" for field in (*fields, user.pw_gecos) for c in field):
        return None
    return ":".join(fields)


def tool_pwconvert(argv: "list[str]") -> int:
    """pure-pwconvert(8). Always 0; Compat: arguments are ignored (main)."""
    import pwd
    if argv[:1] in (["-h"], ["--help"]):
        print(PWCONVERT_USAGE)
        return 0
    shells, shadow = pwconvert_shells(), pwconvert_shadow()
    lines = [pwconvert_line(user, shadow.get(user.pw_name, user.pw_passwd), shells) for user in pwd.getpwall()]
    sys.stdout.flush()
    sys.stdout.buffer.write(b"".join(os.fsencode(line) + b"\n" for line in lines if line is not None))
    sys.stdout.buffer.flush()
    return 0

# ==== statsdecode: pure-statsdecode ===============================================================
# Makes the time at the head of each line of a stats log readable. Nothing that a terminal would obey comes out.

STATSDECODE_DIGITS = 41                 # of a time; the rest is dropped, as in the original
STATSDECODE_CONTROLS = bytes(b for b in range(32) if b != 10) + b"\x7f"


def statsdecode_line(line: bytes) -> bytes:
    """A line of a stats log with its time as yyyy/mm/dd HH:MM:SS, local, and without control bytes but its newline.

    Compat: what follows the digits is dropped, whatever it is (main).
    """
    rest = line.lstrip(b"0123456789")
    digits = line[:len(line) - len(rest)][:STATSDECODE_DIGITS]
    if not rest:
        return b""                      # the end of the file, within a time
    try:
        tm = time.localtime(int(digits or b"0"))
        stamp = b"%d/%02d/%02d %02d:%02d:%02d " % tm[:6]
    except (OverflowError, OSError, ValueError):
        stamp = b"- - "
    return stamp + rest[1:].translate(None, STATSDECODE_CONTROLS)


def tool_statsdecode(argv: "list[str]") -> int:
    """pure-statsdecode(8). Exit codes: 0, 1 without exactly one argument, 255 when it cannot be read."""
    if len(argv) != 1:
        print("Usage: statsdecode FILE, or - for standard input: a log of the format stats, with readable times")
        return 1
    try:
        with open(0 if argv[0] == "-" else argv[0], "rb", closefd=argv[0] != "-") as file:
            for line in file:
                sys.stdout.buffer.write(statsdecode_line(line))
        sys.stdout.buffer.flush()
    except OSError as error:
        print(f"pure-statsdecode: {printable(os.fsencode(argv[0]))}: {error.strerror}", file=sys.stderr)
        return 255
    return 0

# ==== Starting ====================================================================================
# From a command line to Monitor.run(): options, listening sockets, state directory, log, pid file. Mistakes end here,
# with one line on stderr and exit status 1, before anybody is served. Nothing of a client is read in this section.

PROGRAM = "pure-ftpd"
USAGE = "usage: pureftpd.py [options] [configuration file]\n       pureftpd.py TOOL ...    with TOOL one of: %s"


def inetd_client() -> "socket.socket | None":
    """The client on descriptor 0 when a super-server has started us, moved out of the way of stray output; else None.
    """
    try:
        if not stat.S_ISSOCK(os.fstat(0).st_mode):
            return None
        sock = socket.socket(fileno=os.dup(0))
        sock.getpeername()
    except OSError:
        return None
    if sock.family not in (socket.AF_INET, socket.AF_INET6):    # ssh(1) and others give programs such a stdin
        sock.close()
        return None
    null = os.open(os.devnull, os.O_RDWR)
    for fd in (0, 1, 2):
        os.dup2(null, fd)
    os.close(null)
    return sock


def pidfile_write(path: str) -> None:
    """Write our process id, over whatever was there. Raises ConfigError."""
    try:
        try:
            os.unlink(path)
        except FileNotFoundError:
            pass
        fd = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC, 0o644)
        with open(fd, "w") as file:
            file.write("%d\n" % os.getpid())
    except OSError as error:
        raise ConfigError(f"-g {path}: {error.strerror}") from None


def pidfile_remove(path: str) -> None:
    """Remove the file unless another server has written it anew."""
    try:
        with open(path) as file:
            if file.read(32) == "%d\n" % os.getpid():
                os.unlink(path)
    except OSError:
        pass


def descriptors_raise() -> None:
    """Allow as many descriptors as the system lets us."""
    import resource
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if hard == resource.RLIM_INFINITY or hard > 1 << 20:
        hard = 1 << 20
    resource.setrlimit(resource.RLIMIT_NOFILE, (max(soft, hard), resource.getrlimit(resource.RLIMIT_NOFILE)[1]))


def announce(setup: Setup, listeners: "list[Listener]") -> None:
    """Say where we listen; and without root and accounts, which is the first thing people try, what they have started.
    """
    options, log = setup.options, setup.log
    for listener in listeners:
        host, port = listener.sock.getsockname()[:2]
        log.info("Listening on %s port %d%s" % (host, port, " (TLS)" if listener.implicit else ""))
    if options.passiveportrange:
        log.info("%d clients at once, because -p has %d ports" % (
            options.maxclientsnumber, options.passiveportrange[1] - options.passiveportrange[0] + 1))
    if not setup.privileges.root and not options.login and not options.daemonize and listeners:
        host, port = listeners[0].sock.getsockname()[:2]
        said = ("Serving %s, %s, to anyone who can reach %s port %d: ftp://%s/\n"
                "Other machines: -S 0.0.0.0,%d    Accounts: pureftpd.py pw useradd NAME -d DIR -f ./passwd -F ./users.pdb -m, "
                "then -l puredb:./users.pdb\n"
                "All options: --help    Stop: Ctrl-C" % (
                    printable(setup.anonymous_root), "with uploads" if not options.anonymouscantupload else
                    "read-only" if not options.anonymouscancreatedirs else "with new directories",
                    host, port, "[%s]:%d" % (host, port) if ":" in host else "%s:%d" % (host, port), port))
        try:
            print(said, flush=True)
        except OSError:
            pass                                            # nobody reads it
    if options.tlsbind and listeners and not any(listener.implicit for listener in listeners):
        log.warning("--tlsbind is not heeded: the sockets are systemd's")


def serve_forever(argv: "list[str]", options: Any) -> int:
    """Be the daemon until it is told to end; the exit status. Raises ConfigError."""
    try:
        os.getcwd()
    except OSError as error:
        raise ConfigError(f"the current directory: {error.strerror}; start in another one") from None
    privileges = privsep_account()
    privsep_check(privileges)
    inetd = inetd_client()
    log = Log(options.syslogfacility, options.logpid, options.verboselog)
    if privileges.name == PRIVSEP_USERS[-1]:
        log.warning("Running as %s, which other services may share: create a user called %s" % (
            privileges.name, PRIVSEP_USERS[0]))
    setup = setup_read(options, log, privileges)
    # which removes the entries that a server killed with -9 has left
    scoreboard_read(options.statedir)
    pipe = uploadpipe_create(options.statedir) if options.uploadscript else None
    listeners = [] if inetd else listeners_renew(options, [])
    pidfile = options.pidfile or ("/run/pure-ftpd.pid" if privileges.root else os.path.join(options.statedir, "pure-ftpd.pid"))
    pidfile = os.path.abspath(pidfile)                  # -B leaves the directory that it is relative to
    title_area_prepare(PROGRAM)
    descriptors_raise()
    activated = os.environ.get("LISTEN_PID") == str(os.getpid())
    ready = background() if options.daemonize and not inetd else None
    if activated:
        os.environ["LISTEN_PID"] = str(os.getpid())         # SIGHUP wants to know it again
    if not inetd:
        pidfile_write(pidfile)
    try:
        announce(setup, listeners)
        return privsep_init(setup, argv, listeners, inetd, ready)
    finally:
        if not inetd:
            with as_root(privileges):
                pidfile_remove(pidfile)
        if pipe is not None:
            os.close(pipe)


def privsep_init(setup: Setup, argv: "list[str]", listeners: "list[Listener]", inetd: "socket.socket | None",
                 ready: "int | None") -> int:
    """Become PRIV: load all, close what is not needed, fork SERVER, drop root till it is needed. The exit status."""
    import fcntl
    import grp
    import pwd
    import resource
    del fcntl, grp, pwd, resource                   # loaded here, before the first fork, once for all children
    if setup.privileges.root:
        try:
            os.setgroups([setup.privileges.gid])
            os.setegid(setup.privileges.gid)
        except OSError as error:
            raise ConfigError("root cannot give up its groups here (%s): give the container the capability SETGID, or start "
                              "as an ordinary user" % error.strerror) from None
    give_up_for_all(setup.log)
    monitor = Monitor(setup, argv, listeners, inetd)
    if ready is not None:
        detach(ready)
    privsep_privpart_closejunk(setup)
    process_title("pure-ftpd (PRIV)")
    import gc
    gc.collect()
    memory_trim()
    gc.freeze()
    monitor.run()
    return monitor.status


def privsep_privpart_closejunk(setup: Setup) -> None:
    """PRIV needs no terminal to read from."""
    null = os.open(os.devnull, os.O_RDONLY)
    os.dup2(null, 0)
    os.close(null)


TOOLS: "dict[str, Callable[[list[str]], int]]" = {
    "pw": tool_pw,
    "pwconvert": tool_pwconvert,
    "quotacheck": tool_quotacheck,
    "ftpwho": tool_ftpwho,
    "uploadscript": tool_uploadscript,
    "authd": tool_authd,
    "statsdecode": tool_statsdecode,
}


def tool_run(tool: str, argv: "list[str]") -> int:
    """Be that tool, under its name in ps(1); the exit status."""
    title_area_prepare("pure-" + tool)
    process_title("pure-" + tool)
    return TOOLS[tool](argv)


def inheritance_refuse() -> None:
    """What whoever starts us may have left us: no descriptors 0, 1 or 2, where our sockets would be found and log lines go to
    them; blocked signals; and children that nobody may wait for.
    """
    signal.pthread_sigmask(signal.SIG_SETMASK, ())
    signal.signal(signal.SIGCHLD, signal.SIG_DFL)
    try:
        fd = os.open(os.devnull, os.O_RDWR)
        while fd < 3:
            os.set_inheritable(fd, True)
            fd = os.open(os.devnull, os.O_RDWR)
        os.close(fd)
    except OSError:
        pass                                                # an image that is being made: tools work without /dev


def main(argv: "list[str]") -> int:
    """The program: a tool when it is called by a tool's name or with one as its first word, else the daemon.

    The exit status.
    """
    inheritance_refuse()
    called = os.path.basename(argv[0])
    if called.startswith("pure-") and called[5:] in TOOLS:
        return tool_run(called[5:], argv[1:])
    if len(argv) > 1 and argv[1] in TOOLS:
        return tool_run(argv[1], argv[2:])
    try:
        options = options_read(argv[1:])
        if options.help:
            print(options_help(OPTIONS_BY_TOPIC, USAGE % ", ".join(TOOLS)))
            return 0
        if options.version:
            print("pureftpd.py " + VERSION)
            return 0
        return serve_forever(argv[1:], options)
    except ConfigError as error:
        print(f"{PROGRAM}: {error}", file=sys.stderr)
        return 1


if __name__ == "__main__":
    sys.exit(main(sys.argv))
