"""Tests of pureftpd.py: python3 -m unittest. What needs root, or the original, is skipped with a reason."""

import ast
import contextlib
import ctypes
import errno
import fcntl
import ftplib
import functools
import hashlib
import inspect
import io
import json
import os
import plistlib
import pty
import pwd
import random
import re
import resource
import select
import selectors
import shlex
import shutil
import signal
import socket
import sqlite3
import ssl
import stat
import statistics
import struct
import subprocess
import sys
import tempfile
import threading
import time
import types
import unittest
import warnings
from pureftpd import (
    BackendBroken, ConfigError, Defender, OPTIONS, Option, Peer, Refused, access_allows, access_is_trusted,
    access_now, address_text, flag, options_parse, options_read,
)
from unittest import mock
from xml.etree import ElementTree

import pureftpd


# ==== Tests: layout ===============================================================================


PRIVILEGE_CALLS = {"seteuid", "setuid", "setresuid", "setreuid", "setgid", "setegid", "setresgid", "setregid", "setgroups",
                   "initgroups", "chroot", "setns", "unshare", "fchroot"}
ROOT_LINES_MAX = 610                # of the section in which everything runs as root; more is a decision
FUNCTION_LINES_MAX = 45
LINE_MAX = 130


class Layout(unittest.TestCase):
    """The promises that style.md makes to who opens the file."""

    @classmethod
    def setUpClass(cls):
        cls.source = inspect.getsource(pureftpd)
        cls.lines = cls.source.splitlines()
        cls.tree = ast.parse(cls.source)
        cls.starts = [number for number, line in enumerate(cls.lines, 1) if line.startswith("# ==== ")]
        cls.names = re.findall(r"^# ==== (.+?) =+$", cls.source, re.M)

    def section(self, line):
        """The number of the section that line lies in; 0 for what is before the first."""
        return sum(start <= line for start in self.starts)

    def functions(self, tree):
        return [node for node in ast.walk(tree) if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef))]

    def test_map_names_every_section(self):
        self.assertEqual(len(self.names), len(self.starts), "a banner of another form")
        self.assertEqual(len(set(self.names)), len(self.names))
        self.assertEqual(re.findall(r"^    (\S.*?)(?:  .*)?$", pureftpd.__doc__, re.M), self.names)

    def test_banners_have_one_form_and_a_theory(self):
        for start, name in zip(self.starts, self.names):
            with self.subTest(name):
                self.assertEqual(len(self.lines[start - 1]), 100)
                self.assertNotRegex(name.lower(), "util|misc|helper|common|various")
                theory = 0
                while self.lines[start + theory].startswith("#"):
                    theory += 1
                self.assertTrue(1 <= theory <= 24, theory)

    def test_sections_only_look_up(self):
        home = {}
        for node in self.tree.body:
            if isinstance(node, (ast.FunctionDef, ast.ClassDef)):
                home[node.name] = node.lineno
            elif isinstance(node, (ast.Assign, ast.AnnAssign)):
                for target in node.targets if isinstance(node, ast.Assign) else [node.target]:
                    home.update((name.id, node.lineno) for name in ast.walk(target) if isinstance(name, ast.Name))
        for node in ast.walk(self.tree):
            if isinstance(node, ast.Name) and isinstance(node.ctx, ast.Load) and node.id in home:
                self.assertGreaterEqual(self.section(node.lineno), self.section(home[node.id]),
                                        "line %d: %s" % (node.lineno, node.id))

    def test_who_touches_privileges(self):
        found = {}
        for function in self.functions(self.tree):
            calls = {node.attr for node in ast.walk(function) if self.is_privilege(node)}
            if calls:
                found[function.name] = calls
        self.assertEqual(found, {                           # a new name here is a review
            "privsep_check": {"seteuid"},
            "privsep_priv_user": {"seteuid"},
            "privsep_unpriv_user": {"seteuid"},
            "privsep_init": {"setgroups", "setegid"},
            "user_for_good": {"setgroups", "setresgid", "setresuid", "setuid", "setgid"},
            "confine": {"chroot"},
            "tool_become": {"setgroups", "setgid"},
            "quotacheck_enter": {"chroot"},
        })
        everywhere = sum(self.is_privilege(node) for node in ast.walk(self.tree))
        inside = sum(self.is_privilege(node) for function in self.functions(self.tree) for node in ast.walk(function))
        self.assertEqual(everywhere, inside, "a call outside of any function, or in a nested one")

    @staticmethod
    def is_privilege(node):
        return (isinstance(node, ast.Attribute) and node.attr in PRIVILEGE_CALLS
                and isinstance(node.value, ast.Name) and node.value.id == "os")

    def test_who_raises_root(self):
        """as_root and privsep_priv_user are called where PRIV serves a request, and where a child begins."""
        found = {function.name for function in self.functions(self.tree) for node in ast.walk(function)
                 if isinstance(node, ast.Call) and getattr(node.func, "id", "") in ("as_root", "privsep_priv_user")}
        self.assertEqual({name for name in found if not name.startswith("root_")}, self.RAISERS)

    RAISERS = {"__enter__", "login_child", "server_child", "tls_child", "fork_tls", "reload", "serve_forever"}

    def test_root_has_a_budget(self):
        index = next(i for i, name in enumerate(self.names) if name.startswith("Privilege separation"))
        lines = self.starts[index + 1] - self.starts[index]
        self.assertLessEqual(lines, ROOT_LINES_MAX)

    def test_functions_can_be_read_at_once(self):
        long = ["%s: %d lines" % (node.name, node.end_lineno - node.lineno + 1) for node in self.functions(self.tree)
                if node.end_lineno - node.lineno + 1 > FUNCTION_LINES_MAX]
        self.assertEqual(long, [])

    def test_lines_fit(self):
        wrong = [number for number, line in enumerate(self.lines, 1) if len(line) > LINE_MAX or line != line.rstrip()]
        self.assertEqual(wrong, [])

    def test_children_leave_by_exit(self):
        """os.fork() is called where the child's way out is os._exit."""
        forks = {function.name for function in self.functions(self.tree) for node in ast.walk(function)
                 if isinstance(node, ast.Attribute) and node.attr == "fork" and getattr(node.value, "id", "") == "os"}
        for function in self.functions(self.tree):
            if function.name in forks:
                attributes = {node.attr for node in ast.walk(function) if isinstance(node, ast.Attribute)}
                self.assertIn("_exit", attributes, function.name)
        self.assertIn("fork", forks)

    def test_no_bare_except_and_no_global(self):
        for node in ast.walk(self.tree):
            self.assertFalse(isinstance(node, ast.ExceptHandler) and node.type is None, getattr(node, "lineno", 0))
            self.assertNotIsInstance(node, ast.Global, getattr(node, "lineno", 0))

    def test_nothing_heavy_is_imported_at_the_start(self):
        heavy = {"argparse", "dataclasses", "logging", "subprocess", "tempfile", "json", "ssl", "hashlib", "re", "threading"}
        names = {alias.name.split(".")[0] for node in self.tree.body if isinstance(node, ast.Import) for alias in node.names}
        names |= {node.module.split(".")[0] for node in self.tree.body if isinstance(node, ast.ImportFrom)}
        self.assertEqual(names & heavy, set())


# ==== Tests: options ==============================================================================


def options_markdown(rows):
    """The README's table: a line for each row of a table of options, headings as bold lines."""
    lines = ["| Switch | Directive | Meaning |", "| --- | --- | --- |"]
    for row in rows:
        if isinstance(row, str):
            lines.append(f"| | | **{row}** |")
            continue
        switches = [f"`-{row.short}`"] * bool(row.short) + [f"`--{row.long}{'=' * bool(row.arg)}{row.arg}`"]
        names = [f"`{d.name}`" for d in pureftpd.option_directives(row) if d.offered]
        lines.append(f"| {' '.join(switches)} | {' '.join(names)} | {row.help} |")
    return lines


def beside(name):
    """The path of a file that is kept beside pureftpd.py or beside this test; None when there is none."""
    folders = [os.path.dirname(os.path.abspath(path)) for path in (pureftpd.__file__, __file__)]
    return next((os.path.join(f, name) for f in folders if os.path.exists(os.path.join(f, name))), None)


class OptionsTable(unittest.TestCase):
    """What is true of every row."""

    CERTIFICATE = "/etc/ssl/private/pure-ftpd.pem"
    VALUES = {      # attribute: (a good text, its value, a bad text, what the error must say)
        "bind": ("127.0.0.1,2121", (("127.0.0.1", 2121),), "a b", "HOST,PORT"),
        "pidfile": ("/run/x.pid", "/run/x.pid", "", "path of a file"),
        "statedir": ("/run/x", "/run/x", "", "path of a file"),
        "maxclientsnumber": ("10", 10, "0", "from 1 to"),
        "maxclientsperip": ("8", 8, "many", "whole number"),
        "maxidletime": ("5", 300, "soon", "whole number from 1"),
        "login": ("puredb:/etc/x.pdb", (("puredb", "/etc/x.pdb"),), "nis", "one of unix, pam, puredb:file"),
        "minuid": ("100", 100, "-1", "from 0 to"),
        "trustedip": ("2001:DB8::1", ("2001:db8::1",), "ftp.example.org", "address"),
        "peruserlimits": ("3:20", (3, 20), "3", "users:anonymous"),
        "banafter": ("5", 5, "-1", "from 0 to"),
        "bantime": ("5", 300, "0", "from 1 to"),
        "neverban": ("10.0.0.0/8,2001:db8::/32", pureftpd.parse_networks("10.0.0.0/8,2001:db8::/32"), "ftp.example.org", "address"),
        "tlsbind": ("990", ((None, 990),), "a b", "HOST,PORT"),
        "tlsminversion": ("1.3", "1.3", "1.4", "1.2 or 1.3"),
        "tlssessionreuse": ("on", "on", "maybe", "off, auto or on"),
        "fortunesfile": ("/usr/share/x", "/usr/share/x", "a\tb", "control characters"),
        "trustedgid": ("0", 0, "users", "whole number"),
        "umask": ("177:077", (0o177, 0o077), "778:022", "octal"),
        "limitrecursion": ("2000:8", (2000, 8), "0:8", "1 or more"),
        "maxload": ("2.5", 2.5, "nan", "above 0"),
        "maxdiskusagepct": ("95", 95, "101", "from 0 to 100"),
        "quota": ("1000:10", (1000, 10 << 20), "1000", "files:MB"),
        "anonymousratio": ("1:10", (1, 10), "0:10", "1 or more"),
        "userratio": ("2:3", (2, 3), "2:", "up:down"),
        "anonymousbandwidth": ("8", (8192, 8192), "0", "1 or more"),
        "userbandwidth": ("10:", (10240, 0), ":", "up:down"),
        "passiveportrange": ("30000:40000", (30000, 40000), "1000:2000", "1024 to 65535"),
        "forcepassiveip": ("203.0.113.7", ((None, "203.0.113.7"),), "203.0.113", "NETWORK=ADDRESS"),
        "tls": ("1", 1, "4", "from 0 to 3"),
        "certfile": ("/a.pem,/a.key", ("/a.pem", "/a.key"), "/a.pem,", "CERTIFICATE,KEY"),
        "extcert": ("/run/certd.sock", "/run/certd.sock", "", "path of a file"),
        "tlsciphersuite": ("-C:HIGH", "-C:HIGH", "-X:HIGH", "list of ciphers"),
        "syslogfacility": ("LOCAL3", "local3", "loca", "syslog facility"),
        "altlog": ("JSON:/var/log/x", (("json", "/var/log/x"),), "apache:/var/log/x", "FORMAT:/PATH"),
    }

    def test_no_two_rows_share_a_switch_or_a_directive(self):
        switches = [f"-{row.short}" for row in OPTIONS if row.short] + [f"--{row.long}" for row in OPTIONS]
        directives = [d.name.lower() for row in OPTIONS for d in pureftpd.option_directives(row)]
        for names in (switches, directives):
            self.assertEqual(sorted(names), sorted(set(names)))

    def test_all_switches_of_the_original_are_there(self):
        original = "0123456AaBbcCdDeEfFgGhHIijJKklLMmNnoOpPqQrRsStTuUvVwWxXyYzZ".replace("5", "")
        self.assertEqual(sorted(row.short for row in OPTIONS if row.short), sorted(original))

    def test_every_argument_has_a_good_and_a_bad_value_here(self):
        self.assertEqual({row.long for row in OPTIONS if row.arg} - {"bonjour"}, set(self.VALUES))

    def test_good_values(self):
        for row in OPTIONS:
            if row.arg and row.long in self.VALUES:
                good, value, _, _ = self.VALUES[row.long]
                for argv in (["-" + row.short, good], ["-" + row.short + good], [f"--{row.long}={good}"],
                             ["--" + row.long, good]):
                    if row.short or argv[0].startswith("--"):
                        with self.subTest(argv):
                            self.assertEqual(getattr(options_parse(OPTIONS, argv, "x")[0], row.long), value)

    def test_errors_name_the_switch_the_value_and_the_remedy(self):
        for long, (_, _, bad, remedy) in self.VALUES.items():
            with self.subTest(long), self.assertRaises(ConfigError) as caught:
                options_parse(OPTIONS, [f"--{long}={bad}"], "x")
            message = str(caught.exception)
            self.assertIn(remedy, message)
            self.assertTrue(message.startswith(f"--{long} {bad}".rstrip().replace("\t", "\\x09") + ": "), message)
            self.assertNotIn("\n", message)

    def test_flags(self):
        for row in OPTIONS:
            if not row.arg:
                with self.subTest(row.long):
                    self.assertFalse(getattr(options_parse(OPTIONS, [], "x")[0], row.long))
                    self.assertTrue(getattr(options_parse(OPTIONS, ["--" + row.long], "x")[0], row.long))

    def test_help_shows_the_default(self):
        """A default in brackets at the end of the help is what one would write to get it."""
        for row in OPTIONS:
            shown = re.search(r"\[(.*)\]$", row.help)
            with self.subTest(row.long):
                self.assertEqual(bool(shown), row.arg != "" and row.default not in (None, ()) and row.short != "C")
                if shown:
                    self.assertEqual(row.parse(shown[1]), row.default)

    def test_help_is_100_columns_wide_and_names_everything(self):
        text = pureftpd.options_help(pureftpd.OPTIONS_BY_TOPIC, "Usage: pure-ftpd")
        self.assertLessEqual(max(map(len, text.splitlines())), 100)
        for row in OPTIONS:
            self.assertRegex(text, rf"(?m)^  {f'-{row.short},' if row.short else '   '} --{row.long}\b")
        self.assertIn("(in a file: MaxDiskUsage)", re.sub(r"\s+", " ", text))

    def test_readme_has_the_table(self):
        readme = beside("README.md")
        if not readme:
            self.skipTest("no README.md here")
        with open(readme, encoding="utf-8") as file:
            lines = file.read().splitlines()
        missing = [line for line in options_markdown(pureftpd.OPTIONS_BY_TOPIC) if line not in lines]
        self.assertEqual(missing, [], "README.md lacks:\n" + "\n".join(missing))


class OptionsCommandLine(unittest.TestCase):
    """getopt_long(3)'s manners, for the daemon and for tools."""

    ROWS = (
        Option("v", "Verbose", "", flag, 0, "More.", repeat="count"),
        Option("f", "File", "file", str, None, "A file."),
        Option("i", "Item", "a", lambda text: (text,), (), "An item.", repeat="all"),
        Option("", "FileMode", "mode", str, "", "A mode."),
        pureftpd.OPTION_HELP,
    )

    def parse(self, *argv):
        options, rest = options_parse(self.ROWS, list(argv), "pure-tool")
        return {name: value for name, value in vars(options).items() if value and name != "origins"}, rest

    def refused(self, *argv):
        with self.assertRaises(ConfigError) as caught:
            options_parse(self.ROWS, list(argv), "pure-tool")
        return str(caught.exception)

    def test_bundles_abbreviations_and_order(self):
        for argv, expected in (
                ([], ({}, [])),
                (["-vvf", "x", "y"], ({"verbose": 2, "file": "x"}, ["y"])),
                (["-vfx"], ({"verbose": 1, "file": "x"}, [])),
                (["--verb", "--file=x"], ({"verbose": 1, "file": "x"}, [])),
                (["--file", "x", "--filemode", "y"], ({"file": "x", "filemode": "y"}, [])),
                (["one", "-v", "two", "--", "-f"], ({"verbose": 1}, ["one", "two", "-f"])),
                (["-f", "-v"], ({"file": "-v"}, [])),
                (["-fa", "-fb"], ({"file": "b"}, [])),
                (["-ia", "--item=b", "-i", "c"], ({"item": ("a", "b", "c")}, [])),
                (["-", "--file="], ({}, ["-"]))):
            with self.subTest(argv):
                self.assertEqual(self.parse(*argv), expected)

    def test_errors_say_what_would_be_right(self):
        for argv, message in (
                (["-x"], "-x: unknown option; pure-tool --help lists them"),
                (["-vx"], "-x: unknown option; pure-tool --help lists them"),
                (["--verbos3"], "--verbos3: unknown option, did you mean --verbose?; pure-tool --help lists them"),
                (["-f"], "-f: needs a value: -f file"),
                (["--file"], "--file: needs a value: --file=file"),
                (["--verbose=3"], "--verbose: takes no value: write --verbose alone"),
                (["--fil"], "--fil: may mean --file or --filemode: write more of it"),
                (["--f"], "--f: may mean --file or --filemode: write more of it"),
                (["--\n"], "--\\x0a: unknown option; pure-tool --help lists them")):
            with self.subTest(argv):
                self.assertEqual(self.refused(*argv), message)

    def test_origins_remember_who_said_it(self):
        options, _ = options_parse(self.ROWS, ["-vf", "x", "--item=a"], "pure-tool")
        self.assertEqual(options.origins, {"verbose": "-v", "file": "-f x", "item": "--item a"})

    def test_an_attribute_without_row_is_an_error(self):
        with self.assertRaises(AttributeError):
            getattr(options_parse(self.ROWS, [], "pure-tool")[0], "nosuch" + "row")


class OptionValues(unittest.TestCase):
    """The parsers: (text, value) and (text, None) for what is refused."""

    def check(self, parse, cases):
        for text, value in cases:
            with self.subTest(text):
                if value is None:
                    with self.assertRaises(ValueError) as caught:
                        parse(text)
                    self.assertRegex(str(caught.exception), "must|needs|takes|offered|cannot")
                else:
                    self.assertEqual(parse(text), value)

    def test_numbers(self):
        self.check(pureftpd.whole(1, 9, 60), (
            ("1", 60), ("9", 540), ("010", None), ("0", None), ("10", None), ("", None), ("1x", None), (" 1", None),
            ("+1", None), ("\u0661", None), ("\u00b2", None), ("1" * 5000, None), ("1_0", None)))
        self.check(pureftpd.whole_pair(0, "a:b"), (
            ("0:5", (0, 5)), ("5", None), (":5", None), ("5:", None), ("1:2:3", None), ("1:" + "9" * 15, None)))
        self.check(pureftpd.parse_load, (("4", 4.0), ("0.5", 0.5), ("0", None), ("inf", None), ("", None)))
        self.assertIsNone(pureftpd.parse_percentage("0"))

    def test_bandwidths_and_masks(self):
        self.check(pureftpd.parse_bandwidth, (
            ("8", (8192, 8192)), ("1:2", (1024, 2048)), ("1:", (1024, 0)), (":2", (0, 2048)), (":", None),
            ("", None), ("0:1", None), ("1:x", None), ("1:2:3", None)))
        self.check(pureftpd.parse_masks, (
            ("022", (0o022, 0o022)), ("133:022", (0o133, 0o022)), ("077:", (0o077, 0o022)), (":077", (0o133, 0o077)),
            (":", None), ("9", None), ("1000", None), ("0o22", None)))

    def test_paths_do_not_depend_on_the_directory(self):
        self.assertEqual(pureftpd.parse_path("/a/../b"), "/a/../b")
        self.assertEqual(pureftpd.parse_path("x"), os.path.join(os.getcwd(), "x"))
        self.check(pureftpd.parse_path, (("", None), ("/a\nb", None), ("/a\0b", None), ("/\u00e4 b", "/\u00e4 b")))
        self.check(pureftpd.parse_certificate, (
            ("/c", ("/c", "/c")), ("/c,/k", ("/c", "/k")), (",/k", None), ("/c,", None), ("", None)))

    def test_logins(self):
        self.check(pureftpd.parse_login, (
            ("unix", (("unix", None),)), ("PAM", (("pam", None),)), ("unix:", (("unix", None),)),
            ("puredb:/a:b", (("puredb", "/a:b"),)), ("extauth:/s", (("extauth", "/s"),)),
            ("sqlite:/q", (("sqlite", "/q"),)), ("puredb", None), ("puredb:", None), ("unix:/x", None),
            ("ldap:/x", None), ("mysql:/x", None), ("pgsql:/x", None), ("unixx", None), ("", None)))

    def test_logs(self):
        self.check(pureftpd.parse_log, (
            ("/var/log/a:b", (("clf", "/var/log/a:b"),)), ("W3C:/x", (("w3c", "/x"),)),
            ("stats:/x", (("stats", "/x"),)), ("xferlog:/x", (("xferlog", "/x"),)),
            ("clf:x", None), ("x", None), ("clf:", None)))
        self.check(pureftpd.parse_facility, (("none", "none"), ("STDERR", "stderr"), ("ftp", "ftp"), ("", None)))
        if hasattr(socket, "AF_UNIX"):
            import syslog
            for name, number in pureftpd.SYSLOG_FACILITIES.items():
                known = getattr(syslog, "LOG_" + name.upper(), number << 3)
                self.assertEqual(known >> 3, number, name)

    def test_where_to_listen(self):
        self.check(pureftpd.parse_endpoint, (
            ("21", ((None, 21),)), (",21", ((None, 21),)), ("0", ((None, 0),)), ("127.0.0.1", (("127.0.0.1", None),)),
            ("127.0.0.1,", (("127.0.0.1", None),)), ("127.0.0.1,21", (("127.0.0.1", 21),)),
            ("::1,21", (("::1", 21),)), ("[::1],21", (("::1", 21),)), ("[::1]:21", (("::1", 21),)),
            ("[::1]", (("::1", None),)), ("::1", (("::1", None),)), ("fe80::1%eth0,21", (("fe80::1%eth0", 21),)),
            ("ftp.example.org,21", (("ftp.example.org", 21),)), ("localhost,21", (("localhost", 21),)),
            ("", None), (",", None), ("65536", None), ("nosuchservice", None), ("127.0.0.1,x y", None),
            ("127.0.0,21", None), ("a b,21", None), ("[::1,21", None), ("[::1]21", None)))

    def test_a_service_is_a_port(self):
        try:
            port = socket.getservbyname("ftp", "tcp")
        except OSError:
            self.skipTest("no /etc/services")
        self.check(pureftpd.parse_endpoint, (("ftp", ((None, port),)), ("::1,ftp", (("::1", port),))))

    def test_bytes_that_are_no_text_are_refused_like_all_else(self):
        for parse in (pureftpd.parse_address, pureftpd.parse_host, pureftpd.parse_endpoint, pureftpd.parse_passive):
            self.check(parse, (("1.2.3.4\0", None), ("\udcff", None), ("\u0661.1.1.1", None)))

    def test_passive_addresses_by_network(self):
        inner = pureftpd.parse_network("192.168.0.0/16")
        self.check(pureftpd.parse_passive, (
            ("192.168.0.0/16=192.168.1.5,203.0.113.7", ((inner, "192.168.1.5"), (None, "203.0.113.7"))),
            ("192.168.7.7/16=ftp.example.org", ((inner, "ftp.example.org"),)),
            ("2001:db8::1", None), ("2001:db8::/32=1.2.3.4", None), ("", None), ("1.2.3", None),
            ("1.2.3.4,", None), ("=1.2.3.4", None), ("10.0.0.0/33=1.2.3.4", None),
            ("10.0.0.0/x=1.2.3.4", None), ("10.0.0.0/=1.2.3.4", None), ("10.0.0.0/8=", None), ("a b", None)))

    def test_networks(self):
        for text, inside, outside in (
                ("192.168.0.0/16", "192.168.255.1", "192.169.0.1"), ("0.0.0.0/0", "8.8.8.8", "fe80::1%lo"),
                ("10.1.2.3", "10.1.2.3", "10.1.2.4"), ("127.0.0.1/8", "::ffff:127.9.9.9", "::1"),
                ("10.0.0.128/25", "10.0.0.255", "10.0.0.127")):
            with self.subTest(text):
                self.assertTrue(pureftpd.parse_network(text).holds(inside))
                self.assertFalse(pureftpd.parse_network(text).holds(outside))


class ConfigFile(unittest.TestCase):
    """pure-ftpd.conf: its grammar, its errors, Include, and who wins."""

    def setUp(self):
        folder = tempfile.TemporaryDirectory()
        self.addCleanup(folder.cleanup)
        self.folder = os.path.realpath(folder.name)

    def file(self, text, name="c.conf"):
        path = os.path.join(self.folder, name)
        with open(path, "wb") as file:
            file.write(text if isinstance(text, bytes) else text.encode())
        return path

    def argv(self, text):
        return [line.argument for line in pureftpd.options_from_file(self.file(text))]

    def refused(self, text, *argv):
        """The error without the folder."""
        with self.assertRaises(ConfigError) as caught:
            options_read([*argv, self.file(text)])
        return str(caught.exception).replace(self.folder + "/", "")

    def test_a_line_becomes_an_argument(self):
        for line, argument in (
                ("MaxClientsNumber 50", "--maxclientsnumber=50"),
                ("  maxclientsnumber=50  ", "--maxclientsnumber=50"),
                ("MaxClientsNumber = 50", "--maxclientsnumber=50"),
                ("MaxClientsNumber\t:\t50", "--maxclientsnumber=50"),
                ("NoChmod yes", "--nochmod"), ("NoChmod ON", "--nochmod"), ("NoChmod=True", "--nochmod"),
                ("NoChmod : 1", "--nochmod"),
                ("Umask 133:022", "--umask=133:022"), ("Quota 10:20", "--quota=10:20"),
                ("LimitRecursion 100  5", "--limitrecursion=100:5"),
                ("PassivePortRange 30000 40000", "--passiveportrange=30000:40000"),
                ("UserRatio 1 10", "--userratio=1:10"),
                ("UserBandwidth 8", "--userbandwidth=8"), ("UserBandwidth 8 9", "--userbandwidth=8:9"),
                ('Bind "127.0.0.1,21"', "--bind=127.0.0.1,21"), ("Bind ,21", "--bind=,21"),
                ('TrustedIP "::1"', "--trustedip=::1"), ('TLSCipherSuite "HIGH"', "--tlsciphersuite=HIGH"),
                ("CertFile /a b.pem", "--certfile=/a b.pem"),
                ('CertFileAndKey "/a b.pem" /a.key', "--certfile=/a b.pem,/a.key"),
                ("PureDB /a b.pdb", "--login=puredb:/a b.pdb"), ("PureDB:/a.pdb", "--login=puredb:/a.pdb"),
                ("ExtAuth /s", "--login=extauth:/s"), ("SQLite /q", "--login=sqlite:/q"),
                ("UnixAuthentication yes", "--login=unix"), ("PAMAuthentication yes", "--login=pam"),
                ("AltLog clf:/x", "--altlog=clf:/x"), ("MaxDiskUsage 99", "--maxdiskusagepct=99"),
                ("CallUploadScript yes", "--uploadscript"), ("StateDir /s", "--statedir=/s")):
            with self.subTest(line):
                self.assertEqual(self.argv(line + "\n"), [argument])

    def test_what_says_nothing(self):
        self.assertEqual(self.argv("\n   \n# x\n  # NoChmod yes\nNoChmod no\nNoChmod OFF\nNoChmod=false\nNoChmod 0\n"
                                   "PAMAuthentication no\n#"), [])

    def test_line_ends_and_marks_of_windows(self):
        self.assertEqual(self.argv(b"\xef\xbb\xbfNoChmod yes\r\nTLS 1\r\n"), ["--nochmod", "--tls=1"])

    def test_bytes_that_are_no_utf8_survive(self):
        options = options_read([self.file(b"PIDFile /run/\xff.pid\n")])
        self.assertEqual(os.fsencode(options.pidfile), b"/run/\xff.pid")

    def test_errors_name_file_line_reason_and_remedy(self):
        for line, message in (
                ("MaxClientsNumber x", "must be a whole number from 1 to 2147483647"),
                ("MaxClientsNumber 0", "must be a whole number from 1 to 2147483647"),
                ("MaxClientsNumber", "write it as MaxClientsNumber n"),
                ("MaxClientsNumber =", "write it as MaxClientsNumber n"),
                ("MaxClientsNumber = = 5", "write it as MaxClientsNumber n"),
                ("MaxClientsNumber 5 # five", "a comment must stand on a line of its own"),
                ("PIDFile /x # y", "a comment must stand on a line of its own"),
                ("NoChmod", "write it as NoChmod yes|no"),
                ("NoChmod maybe", "must be yes, on, true, 1, no, off, false or 0, and nothing after it"),
                ("NoChmod yes please", "must be yes, on, true, 1, no, off, false or 0, and nothing after it"),
                ("Umask 022", "write it as Umask files:dirs"),
                ("PassivePortRange 30000:40000", "write it as PassivePortRange first last"),
                ("PassivePortRange 40000 30000", "the ports must be from 1024 to 65535, the lower one first"),
                ("UserBandwidth 1 2 3", "write it as UserBandwidth [up ]down"),
                ('TLSCipherSuite "HIGH', "write it as TLSCipherSuite ciphers, without blanks"),
                ('PureDB "/x"', "quotes would be a part of the value here: write it without them"),
                ("MaxClientNumber 5", "unknown directive, did you mean MaxClientsNumber?"),
                ("Zzz 5", "unknown directive; pureftpd.conf.example has them all"),
                (": 5", "unknown directive; pureftpd.conf.example has them all"),
                ("MaxDiskUsagePct 5", "unknown directive: in a file it is MaxDiskUsage"),
                ("Login unix", "unknown directive: in a file it is PureDB or UnixAuthentication or PAMAuthentication "
                               "or ExtAuth or SQLite"),
                ("Help yes", "unknown directive; pureftpd.conf.example has them all"),
                ("Include", "write it as Include FILE"),
                ('Include "x"', "quotes would be a part of the name here: write it without them"),
                ("Bonjour x", "Bonjour is not offered: let Avahi (a file in /etc/avahi/services) or dns-sd announce "
                              "the server"),
                ("LDAPConfigFile /x", "LDAP is not offered: use pam with a module for it, or extauth"),
                ("MySQLConfigFile /x", "MySQL is not offered: use sqlite, or extauth with a program that asks MySQL"),
                ("PGSQLConfigFile /x", "PostgreSQL is not offered: use sqlite, or extauth with a program that "
                                       "asks it")):
            with self.subTest(line):
                self.assertEqual(self.refused(f"# first\nTLS 1\n{line}\n"), f"c.conf:3: {line}: {message}")

    def test_every_directive_refuses_a_bad_value(self):
        for row in OPTIONS:
            for directive in pureftpd.option_directives(row):
                bad = '"' if directive.arg else "maybe"
                with self.subTest(directive.name):
                    self.assertRegex(self.refused(f"TLS 1\n{directive.name} {bad}\n"),
                                     f"^c.conf:2: {directive.name} {bad}: (must be|write it as|quotes would)")

    def test_include(self):
        self.file("TLS 2\nInclude b.conf\nNoChmod yes\n", "a.conf")
        self.file("MinUID 7\n", "b.conf")
        options = options_read([self.file("TLS 1\nInclude a.conf\nInclude none.conf\nInclude /nowhere/x\nMinUID 8\n")])
        self.assertEqual((options.tls, options.nochmod, options.minuid), (2, True, 8))
        self.assertEqual([os.path.basename(path) for path in options.configfiles], ["c.conf", "a.conf", "b.conf"])
        self.assertEqual(options.configfile, os.path.join(self.folder, "c.conf"))

    def test_errors_in_an_included_file_name_that_file(self):
        self.file("\nTLS x\n", "a.conf")
        self.assertTrue(self.refused("Include a.conf\n").startswith("a.conf:2: TLS x: must be"))

    def test_files_include_files_16_deep_and_loops_end(self):
        for n in range(17):
            self.file(f"MinUID {n}\nInclude {n + 1}.conf\n", f"{n}.conf")
        self.assertIn("15.conf:2: Include 16.conf: more than 16 files deep", self.refused("Include 1.conf\n"))
        os.unlink(os.path.join(self.folder, "16.conf"))
        self.assertEqual(options_read([os.path.join(self.folder, "0.conf")]).minuid, 15)
        self.assertIn("does a file include itself?", self.refused("Include c.conf\nInclude c.conf\n"))

    def test_a_file_that_cannot_be_read(self):
        for path, reason in ((os.path.join(self.folder, "none"), "No such file"), (self.folder, "Is a directory"),
                             ("", "must be the path"), ("a\0b", "control characters")):
            with self.subTest(path), self.assertRaisesRegex(ConfigError, reason):
                options_read([path])
        self.assertIn("Is a directory", self.refused(f"Include {self.folder}\n"))

    def test_the_command_line_wins(self):
        path = self.file("MaxClientsNumber 5\nTLS 1\nVerboseLog yes\nPureDB /f.pdb\nBind 21\nBind 22\nMinUID 9\n")
        options = options_read(["-c", "7", path, "-d", "-l", "unix", "-S", "2121"])
        self.assertEqual((options.maxclientsnumber, options.tls, options.verboselog), (7, 1, 2))
        self.assertEqual(options.login, (("unix", None), ("puredb", "/f.pdb")))
        self.assertEqual(options.bind, ((None, 2121),))
        self.assertEqual(options.origins["maxclientsnumber"], "-c 7")
        self.assertEqual(options.origins["minuid"], path + ":7: MinUID 9")
        self.assertEqual(options_read([path]).bind, ((None, 21), (None, 22)))

    def test_repeats(self):
        options = options_read([self.file("TLS 1\nTLS 2\nVerboseLog yes\nVerboseLog yes\nAltLog clf:/a\nAltLog w3c:/b\n"
                                          "UnixAuthentication yes\nPureDB /p\n")])
        self.assertEqual((options.tls, options.verboselog), (2, 2))
        self.assertEqual(options.altlog, (("clf", "/a"), ("w3c", "/b")))
        self.assertEqual(options.login, (("unix", None), ("puredb", "/p")))


class OptionsTogether(unittest.TestCase):
    """options_read without a file: defaults, stray arguments, what makes no sense together."""

    def test_defaults_are_those_of_the_original(self):
        options = options_read([])
        for name, value in {"maxclientsnumber": 50, "maxclientsperip": 0, "maxidletime": 900, "umask": (0o133, 0o022),
                            "limitrecursion": (10000, 5), "login": (), "bind": (), "tls": 0, "minuid": 0,
                            "syslogfacility": "ftp", "verboselog": 0, "passiveportrange": None, "forcepassiveip": (),
                            "certfile": (OptionsTable.CERTIFICATE,) * 2, "daemonize": False, "altlog": (),
                            "configfile": None, "configfiles": (), "origins": {}}.items():
            with self.subTest(name):
                self.assertEqual(getattr(options, name), value)

    def test_help_and_version_look_at_nothing_else(self):
        self.assertTrue(options_read(["-h", "/nonexistent", "stray", "-46"]).help)
        self.assertTrue(options_read(["--version", "/nonexistent"]).version)

    def test_stray_arguments(self):
        with self.assertRaisesRegex(ConfigError, "^b: stray argument: .* one configuration file"):
            options_read(["-B", "a", "b"])

    def test_contradictions(self):
        for argv, message in (
                (["-4", "-6"], "^-6: with -4 "), (["-e", "-E"], "^-E: with -e "),
                (["-B", "-f", "stderr"], "^-f stderr: with -B "), (["-4", "-S", "::1,21"], "^-S ::1,21: an IPv6 "),
                (["-6", "--bind=127.0.0.1"], "^--bind 127.0.0.1: an IPv4 ")):
            with self.subTest(argv), self.assertRaisesRegex(ConfigError, message):
                options_read(argv)
        options_read(["-4", "-S", "127.0.0.1,21", "-S", "ftp.example.org,21", "-B"])
        options_read(["-6", "-S", "::1", "-f", "stderr"])

    def test_heavy_modules_are_imported_when_needed(self):
        source = inspect.getsource(pureftpd)
        self.assertNotRegex(source, r"(?m)^(import|from) (argparse|getopt|difflib|textwrap|ipaddress)\b")


class ConfigExample(unittest.TestCase):
    """pureftpd.conf.example: every directive, and nothing that does not parse."""

    def setUp(self):
        path = beside("pureftpd.conf.example")
        if not path:
            self.skipTest("no pureftpd.conf.example here")
        self.path = path
        with open(path, encoding="utf-8") as file:
            self.lines = file.read().splitlines()

    def test_it_is_a_configuration(self):
        options = options_read([self.path])
        self.assertTrue(options.chrooteveryone)

    def test_every_line_switched_on_is_right(self):
        with tempfile.NamedTemporaryFile("w", suffix=".conf") as file:
            for line in self.lines:
                if re.match(r"#?\w", line):
                    with self.subTest(line):
                        file.seek(0)
                        file.truncate()
                        file.write(line.lstrip("#") + "\n")
                        file.flush()
                        options = options_read([file.name])
                        self.assertTrue(options.origins or line.startswith("#Include"))

    def test_it_has_what_the_table_has(self):
        directives = {d.name for row in OPTIONS for d in pureftpd.option_directives(row) if d.offered}
        shown = {re.match(r"#?(\w+)", line)[1] for line in self.lines if re.match(r"#?\w", line)}
        self.assertEqual(shown, directives | {"Include"})

    def test_its_lines_fit_a_screen(self):
        self.assertTrue(all(len(line) <= 120 for line in self.lines))


# ==== Tests: passwords ============================================================================


LONG_SALT = "toolongsaltstring"
# Examples of "Unix crypt using SHA-256 and SHA-512" (U. Drepper), and what pure-pw tries crypt(3) with.
CRYPT_VECTORS = (
    ("$1$12345678$oEitTZYQtRHfNGmsFvTBA/", b"test"),
    ("$5$saltstring$5B8vYYiY.CVt1RlTTf8KbXBH3hsxY/GNooZaBBGWEc5", b"Hello world!"),
    ("$6$saltstring$svn8UoSVapNtMuq1ukKS4tPQd8iKwSMHWjl/O817G3uBnIFNjnQJuesI68u4OTLiBFdcbYEdFCoEOfaS35inz1",
     b"Hello world!"),
    ("$6$rounds=10000$saltstringsaltst$OW1/O6BYHV6BcXZu8QVeXbDWra3Oeqh0sbHbbMCVNSnCM/UrjmM0Dp8vOuZeHBy/YTBmSK6H9qs/"
     "y3RnOaw5v.", b"Hello world!"),
)
SCRYPT_OF_LIBSODIUM = ("$7$B6....2....WmH3aK91ifybNeRxHLFRslZxptP1Ozm4Ye4fHxJqCq0$"
                       "nbNBICcLtUAsPwErJiSY4rSkkjkizgU6SdngdhQZVgA")               # password: pw
ARGON2 = "$argon2id$v=19$m=64,t=3,p=1$c29tZXNhbHQxMjM0NTY3OA$"


def available(function, *arguments):
    """What function(*arguments) answers, or None where a library is missing."""
    try:
        return function(*arguments)
    except (ImportError, pureftpd.HashUnsupported):
        return None


@contextlib.contextmanager
def without(*modules):
    """A world in which these modules cannot be imported."""
    pureftpd.crypt_from_library.cache_clear()
    try:
        with mock.patch.dict(sys.modules, dict.fromkeys(modules)):
            yield
    finally:
        pureftpd.crypt_from_library.cache_clear()


class CryptInPython(unittest.TestCase):
    def test_published_examples(self):
        for hashed, password in CRYPT_VECTORS:
            with self.subTest(hashed):
                self.assertEqual(pureftpd.crypt_in_python(password, hashed.encode()), hashed.encode())

    @unittest.skipUnless(pureftpd.crypt_function(), "needs libcrypt")
    def test_agrees_with_libcrypt(self):
        crypt, chance = pureftpd.crypt_function(), random.Random(7)
        for length in (*range(0, 18), 31, 32, 33, 63, 64, 65, 127, 128, 129, 255):
            password = bytes(chance.randrange(1, 256) for _ in range(length))
            salt = "".join(chance.choice(pureftpd.CRYPT64) for _ in range(length % 19))
            rounds = chance.randrange(1000, 1100)
            for prefix in ("$1$", f"$5$rounds={rounds}$", f"$6$rounds={rounds}$"):
                setting = (prefix + salt + "$").encode()
                with self.subTest(setting, password=password):
                    self.assertEqual(pureftpd.crypt_in_python(password, setting), crypt(password, setting))

    @unittest.skipUnless(pureftpd.crypt_function(), "needs libcrypt")
    def test_agrees_with_libcrypt_on_odd_settings(self):
        crypt = pureftpd.crypt_function()
        for setting in (b"$1$", b"$5$", b"$6$", b"$5$$", b"$6$ab", b"$6$" + LONG_SALT.encode(),
                        b"$1$" + LONG_SALT.encode(),
                        b"$6$rounds=1000$", b"$6$rounds=1000$ab", b"$5$rounds=1234$ab$"):
            with self.subTest(setting):
                self.assertEqual(pureftpd.crypt_in_python(b"pw", setting), crypt(b"pw", setting))

    def test_refuses_what_crypt5_refuses(self):
        for setting in (b"$6$rounds=999$ab$", b"$6$rounds=1000000000$ab$", b"$6$rounds=01000$ab$", b"$6$rounds=$ab$",
                        b"$6$rounds=1e3$ab$", b"$5$rounds=1000", b"$2b$04$abc", b"ab", b"$", b"$6"):
            with self.subTest(setting):
                self.assertIsNone(pureftpd.crypt_in_python(b"pw", setting))

    def test_works_with_hashlib_alone(self):
        with without("_md5", "_sha256", "_sha512", "_sha2"):
            self.test_published_examples()


class Verifying(unittest.TestCase):
    def test_what_is_no_hash_fits_no_password(self):
        for stored in ("", "*", "!", "!!", "x", "*0", "*1", "secret", "$secret", "$se$cret", "!$6$saltstring$abc",
                       "\u00e9" * 13, "{SHA}W6ph5Mm5Pz8GgiULbPgzG37mj9g=", "a" * 20, "has space 13!", "$6$a\n$b$c"):
            for password in (b"", b"*", b"secret", stored.encode()):
                with self.subTest(stored, password=password):
                    self.assertFalse(pureftpd.password_verify(password, stored))

    def test_right_and_wrong_passwords(self):
        samples = [*CRYPT_VECTORS, (SCRYPT_OF_LIBSODIUM, b"pw")]
        for hashed, password in samples:
            with self.subTest(hashed):
                self.assertTrue(pureftpd.password_verify(password, hashed))
                for wrong in (b"", password + b"x", password[:-1], password + b"\0", password.upper()):
                    self.assertFalse(pureftpd.password_verify(wrong, hashed))
                self.assertFalse(pureftpd.password_verify(password, hashed[:-1] + ("." if hashed[-1] != "." else "/")))

    @unittest.skipUnless(available(pureftpd.shared_library, pureftpd.LIBCRYPT, "crypt"), "needs libcrypt")
    def test_kinds_that_only_libcrypt_knows(self):
        crypt = pureftpd.crypt_function()
        for setting in (b"ab", b"_J9..abcd", b"$2a$04$abcdefghijklmnopqrstuu", b"$2b$04$abcdefghijklmnopqrstuu",
                        b"$2y$04$abcdefghijklmnopqrstuu", b"$y$j75$abcdefgh"):
            for password in (b"pw", b"\xff\xe9 latin"):
                hashed = crypt(password, setting)
                if not hashed or not hashed.startswith(setting[:2]):
                    continue                                                # glibc without libxcrypt
                with self.subTest(setting):
                    self.assertTrue(pureftpd.password_verify(password, hashed.decode()))
                    self.assertFalse(pureftpd.password_verify(password + b"\0", hashed.decode()))
                    self.assertFalse(pureftpd.password_verify(b"px", hashed.decode()))

    def test_same_answers_without_libcrypt_and_without_the_crypt_module(self):
        for hidden in (("ctypes",), ("ctypes", "_crypt")):
            with self.subTest(hidden), without(*hidden):
                self.assertEqual(pureftpd.crypt_function() is None, "_crypt" in hidden or sys.version_info >= (3, 13))
                for hashed, password in CRYPT_VECTORS:
                    self.assertTrue(pureftpd.password_verify(password, hashed))
                    self.assertFalse(pureftpd.password_verify(b"\xff", hashed))
                for stored in ("*", "*0", "", "x"):
                    self.assertFalse(pureftpd.password_verify(b"x", stored))

    def test_a_hash_that_cannot_be_checked_says_what_to_install_and_nothing_of_itself(self):
        with without("ctypes", "_crypt", "_argon2_cffi_bindings"):
            for hashed, package in ((ARGON2 + "A" * 43, "argon2-cffi"),
                                    ("$argon2i$v=19$m=8,t=1,p=1$c2FsdHNhbHQ$AAAA", "libsodium"),
                                    ("$2b$04$abcdefghijklmnopqrstuuSECRET", "libxcrypt"),
                                    ("$y$j75$abcd$SECRET", "libxcrypt"),
                                    ("abSECRET56789", "libxcrypt"), ("$zzz$a$SECRET", "libxcrypt")):
                with self.subTest(hashed):
                    with self.assertRaises(pureftpd.HashUnsupported) as caught:
                        pureftpd.password_verify(b"pw", hashed)
                    self.assertIn(package, str(caught.exception))
                    self.assertNotIn("SECRET", str(caught.exception))
            with mock.patch.dict(sys.modules, hashlib=None), self.assertRaises(pureftpd.HashUnsupported):
                pureftpd.password_verify(b"pw", SCRYPT_OF_LIBSODIUM)

    def test_hostile_and_malformed_hashes_are_errors_at_once(self):
        rest = "$c2FsdHNhbHQ$" + "A" * 43
        scrypt = pureftpd.crypt64
        for hashed in ("$argon2id$v=19$m=4294967295,t=1,p=1" + rest, "$argon2id$v=19$m=8192,t=4294967295,p=1" + rest,
                       "$argon2id$v=19$m=1048576,t=1,p=65536" + rest, "$argon2id$v=19$m=x,t=1,p=1" + rest,
                       "$argon2id$v=19$t=1" + rest, "$argon2id$$$$$$", "$argon2i$v=19" + rest,
                       "$7$z" + scrypt(8, 5) + scrypt(1, 5) + "salt$hash",
                       "$7$A" + scrypt(2**30 - 1, 5) + scrypt(1, 5) + "s$h",
                       "$7$6" + scrypt(8, 5) + scrypt(2**30 - 1, 5) + "s$h",
                       "$7$6" + scrypt(0, 5) + scrypt(0, 5) + "s$h",
                       "$7$!!$x$", "$7$$$", "$7$6..$$", "$6$rounds=9999999999$a$b", "$6$rounds=10$a$b",
                       "$6$rounds=999999999$a$b", "$2b$31$abcdefghijklmnopqrstuuabcdefghijklmnopqrstuabcdefghij."):
            with self.subTest(hashed):
                start = time.process_time()
                with self.assertRaises(pureftpd.HashUnsupported):
                    pureftpd.password_verify(b"pw", hashed)
                self.assertLess(time.process_time() - start, 0.5)


class Argon2(unittest.TestCase):
    MAKERS = {name: available(getattr(pureftpd, name))
              for name in ("argon2_from_cffi", "argon2_from_libsodium", "argon2_from_libargon2")}

    def test_every_library_reads_what_every_library_writes(self):
        found = {name: functions for name, functions in self.MAKERS.items() if functions}
        if not found:
            self.skipTest("no Argon2 library is here")
        for writer, (_, make) in found.items():
            hashed = make(b"p\xe9\0w", 2, 64)
            self.assertRegex(hashed.decode(), r"^\$argon2id\$v=19\$m=64,t=2,p=1\$[A-Za-z0-9+/]{22}\$[A-Za-z0-9+/]{43}$")
            self.assertNotEqual(hashed, make(b"p\xe9\0w", 2, 64))
            for reader, (verify, _) in found.items():
                with self.subTest(writer=writer, reader=reader):
                    self.assertTrue(verify(hashed, b"p\xe9\0w"))
                    self.assertFalse(verify(hashed, b"p\xe9"))
                    self.assertFalse(verify(hashed, b""))

    def test_known_hashes(self):
        known = ("$argon2id$v=19$m=64,t=3,p=4$c3Nzc3Nzc3Nzc3Nzc3Nzcw$zgZgnA+WKTGOlqn8S6j7HGkWQKmgEmWkmwweFTwVaJo",
                 "$argon2i$v=19$m=64,t=3,p=1$c3Nzc3Nzc3Nzc3Nzc3Nzcw$v5Yfu4mwqkpV0vlv9ae6rgCUJVtyhkKBAwZI7Wa+C3I")
        for name, functions in self.MAKERS.items():
            for hashed in known if functions else ():
                with self.subTest(hashed, library=name), \
                        mock.patch.object(pureftpd, "argon2_functions", lambda f=functions: f):
                    self.assertTrue(pureftpd.password_verify(b"pw", hashed))
                    self.assertFalse(pureftpd.password_verify(b"px", hashed))
                    self.assertTrue(pureftpd.password_verify(b"pw", pureftpd.argon2_make(b"pw", 1, 8192)))


class NewHashes(unittest.TestCase):
    def setUp(self):
        for constant in ("AUTH_TIME", "AUTH_TIME_MIN"):
            patch = mock.patch.object(pureftpd, constant, getattr(pureftpd, constant) / 50)
            patch.start()
            self.addCleanup(patch.stop)

    def test_memory_is_shared_by_the_logins_and_the_passes_fill_the_time(self):
        seen = []
        with mock.patch.object(pureftpd, "password_hash", lambda *arguments: seen.append(arguments[1:])), \
                mock.patch.object(time, "process_time", lambda: 0.001 * sum(passes for passes, _ in seen)):
            for logins, memory, share, target in ((8, 64 << 20, 8 << 20, 0.02), (1, 64 << 20, 64 << 20, 0.02),
                                                  (16, 64 << 20, 4 << 20, 0.01), (1000, 64 << 20, 67108, 0.005),
                                                  (10**6, 1 << 20, 8192, 0.005)):
                with self.subTest(logins=logins):
                    seen.clear()
                    pureftpd.best_crypt(b"pw", logins, memory)
                    self.assertEqual({memory for _, memory in seen}, {share})
                    self.assertEqual(seen[-1][0], round(target / 0.001))

    def test_a_new_hash_verifies_and_takes_about_the_time(self):
        hashed = pureftpd.best_crypt(b"pw", 8, 8 << 20)
        start = time.process_time()
        self.assertTrue(pureftpd.password_verify(b"pw", hashed))
        self.assertLess(time.process_time() - start, 8 * pureftpd.AUTH_TIME)

    def test_scrypt_serves_where_nothing_computes_argon2(self):
        with without("_argon2_cffi_bindings", "ctypes"):
            hashed = pureftpd.best_crypt(b"pw", 8, 16 << 20)
            self.assertRegex(hashed, r"^\$7\$9" + r"6\.\.\.\.[./0-9A-Za-z]{5}[./0-9A-Za-z]{43}\$[./0-9A-Za-z]{43}$")
            self.assertTrue(pureftpd.password_verify(b"pw", hashed))
            with mock.patch.dict(sys.modules, hashlib=None), self.assertRaises(pureftpd.HashUnsupported):
                pureftpd.best_crypt(b"pw")

    def test_libsodium_reads_our_scrypt_and_we_read_its(self):
        library = available(pureftpd.shared_library, pureftpd.LIBSODIUM,
                            "crypto_pwhash_scryptsalsa208sha256_str_verify")
        if library is None:
            self.skipTest("libsodium is not here")
        library.sodium_init()
        text, u64 = ctypes.c_char_p, ctypes.c_ulonglong
        verify = library.crypto_pwhash_scryptsalsa208sha256_str_verify
        verify.argtypes = [text, text, u64]
        make = library.crypto_pwhash_scryptsalsa208sha256_str
        make.argtypes = [text, text, u64, u64, ctypes.c_size_t]
        for password in (b"", b"pw", b"p\xe9w" * 30):
            for passes in (1, 3):
                hashed = pureftpd.scrypt_make(password, passes, 1 << 20)
                self.assertEqual(verify(hashed.encode(), password, len(password)), 0)
                self.assertEqual(verify(hashed.encode(), password + b"x", len(password) + 1), -1)
            theirs = ctypes.create_string_buffer(102)
            self.assertEqual(make(theirs, password, len(password), 1 << 18, 16 << 20), 0)
            self.assertTrue(pureftpd.password_verify(password, theirs.value.decode()))
            self.assertFalse(pureftpd.password_verify(password + b"x", theirs.value.decode()))


def costs_agree(share, costs):
    """Whether lists of CPU times have about the same least or the same middle value: the highest is within 1 + `share` of the lowest.

    On a virtual machine the same work may take half as long again for seconds, while a neighbour uses the other half of the
    core: the best of many tries is then a rare one that one list has and the other has not, and the middle is not; and where
    the tries are half fast and half slow, it is the other way round.
    """
    best, middle = [min(times) for times in costs], [statistics.median(times) for times in costs]
    return any(max(values) < (1 + share) * min(values) for values in (best, middle))


def settled_costs(share, actions):
    """The CPU times of each action in seconds. They take turns till costs_agree(), or 100 times."""
    costs = [[] for _ in actions]
    for turn in range(100):
        for action, times in zip(actions, costs):
            start = time.process_time()
            action()
            times.append(time.process_time() - start)
        if turn > 5 and costs_agree(share, costs):
            break
    return costs


class Wasting(unittest.TestCase):
    def test_a_missing_user_costs_what_a_wrong_password_costs(self):
        samples = ["$6$rounds=4000$salt$" + "." * 86, pureftpd.scrypt_make(b"pw", 1, 1 << 20)]
        for sample in samples:
            with self.subTest(sample[:3]):
                costs = settled_costs(0.1, [lambda: self.assertFalse(pureftpd.password_verify(b"guess", sample)),
                                            lambda: self.assertFalse(pureftpd.password_waste(b"guess", sample))])
                self.assertTrue(costs_agree(0.1, costs), costs)

    def test_a_sample_that_is_no_hash_or_cannot_be_checked_does_no_harm(self):
        with mock.patch.object(pureftpd, "password_verify", side_effect=pureftpd.HashUnsupported) as verify:
            for sample in ("", "*", "$zzz$a$b"):
                self.assertIsNone(pureftpd.password_waste(b"guess", sample))
            self.assertEqual([call.args[1] for call in verify.call_args_list],
                             [pureftpd.HASH_SAMPLE] * 2 + ["$zzz$a$b"])

    def test_preloading_loads_libcrypt_and_no_openssl(self):
        code = ("import sys, pureftpd\n"
                "pureftpd.passwords_preload(sys.argv[1:] and (sys.argv[1],) or (pureftpd.HASH_SAMPLE,))\n"
                "print(*sorted({'hashlib', '_hashlib', 'hmac', '_argon2_cffi_bindings', 'crypt'} & set(sys.modules)))")
        for arguments in ([], [SCRYPT_OF_LIBSODIUM], [ARGON2 + "A" * 43]):
            reader, writer = os.pipe()
            path = os.path.dirname(os.path.abspath(pureftpd.__file__))
            child = os.posix_spawn(sys.executable, [sys.executable, "-c", code, *arguments],
                                   {**os.environ, "PYTHONPATH": path},
                                   file_actions=[(os.POSIX_SPAWN_DUP2, writer, 1)])
            os.close(writer)
            with os.fdopen(reader) as output:
                self.assertEqual(output.read().strip(), "")
            self.assertEqual(os.waitpid(child, 0)[1], 0)


# ==== Tests: puredb ===============================================================================


PURE_PW = next((path for path in ("/opt/pureftpd-orig/usr/bin/pure-pw", shutil.which("pure-pw"))
                if path and os.access(path, os.X_OK)), None)
HASH = b"$6$saltstring$svn8UoSVapNtMuq1ukKS4tPQd8iKwSMHWjl/O817G3uBnIFNjnQJuesI68u4OTLiBFdcbYEdFCoEOfaS35inz1"


class Files(unittest.TestCase):
    """Each test has a directory of its own."""

    def setUp(self):
        self.directory = tempfile.mkdtemp()
        self.addCleanup(shutil.rmtree, self.directory)
        self.path = os.path.join(self.directory, "users.pdb")

    def write(self, data, name="users.pdb"):
        path = os.path.join(self.directory, name)
        with open(path, "wb") as file:
            file.write(data)
        return path

    def read(self, name="users.pdb"):
        with open(os.path.join(self.directory, name), "rb") as file:
            return file.read()

    def in_children(self, *functions):
        """The wait statuses of functions that run at the same time, each in a process of its own."""
        children = []
        for function in functions:
            child = os.fork()
            if child == 0:
                code = 1
                try:
                    function()
                    code = 0
                finally:
                    os._exit(code)
            children.append(child)
        return [os.waitpid(child, 0)[1] for child in children]


class Entries(unittest.TestCase):
    FULL = (b"joe:" + HASH + b":1000:1001:Joe Doe:/home/joe/./:1024:2048:1:10:3:100:1048576:192.168.0.1:10.0.0.0/8:"
            b"a.example,127.0.0.1:evil.example:900-1800")

    def test_all_fields(self):
        self.assertEqual(pureftpd.passwd_entry(self.FULL), (
            b"joe", HASH.decode(), 1000, 1001, b"Joe Doe", b"/home/joe/./", 1024, 2048, 1, 10, 3, 100, 1048576,
            "192.168.0.1", "10.0.0.0/8", "a.example,127.0.0.1", "evil.example", "900-1800"))

    def test_missing_and_empty_fields_are_not_given(self):
        full = self.FULL.split(b":")
        for count in range(6, 19):
            with self.subTest(count):
                short = pureftpd.PasswdEntry.from_fields(full[:count])
                self.assertEqual(short, pureftpd.passwd_entry(b":".join(full[:count] + [b""] * (18 - count))))
                self.assertEqual(short[6:count], pureftpd.passwd_entry(self.FULL)[6:count])
                self.assertTrue(all(value in (None, "") for value in short[count:]))

    def test_zero_is_no_ratio_but_a_limit_elsewhere(self):
        entry = pureftpd.passwd_entry(b"joe:*:1:1::/h:0:0:0:0:0:0:0")
        self.assertEqual(entry[6:13], (0, 0, None, None, 0, 0, 0))

    def test_what_cannot_be_understood_is_named(self):
        for field, text in (("login", b""), ("hash", b""), ("uid", b""), ("uid", b"2001x"), ("uid", b"0"),
                            ("uid", b"-1"), ("uid", b" 5"), ("uid", b"4294967296"), ("uid", b"4294967295"),
                            ("gid", b"0"), ("gid", b"users"),
                            ("home", b""), ("home", b"home/joe"), ("bandwidth_ul", b"10k"), ("bandwidth_dl", b"-1"),
                            ("ratio_ul", b"1x"), ("max_sessions", b"many"), ("quota_files", b"1e3"),
                            ("quota_size", b"9" * 30), ("time", b"9"), ("time", b"900-"), ("time", b"9am-6pm"),
                            ("time", b"900-1800x"), ("time", b"-"), ("uid", "\u0663".encode()), ("uid", b"9" * 5000)):
            with self.subTest(field, text=text[:10]):
                fields = self.FULL.split(b":")
                fields[pureftpd.PASSWD_FIELDS.index(field)] = text
                with self.assertRaisesRegex(ValueError, rf"\b{field}\b"):
                    pureftpd.PasswdEntry.from_fields(fields)
        for line in (b"", b"joe", b"joe:x:1:1:gecos"):
            with self.subTest(line), self.assertRaises(ValueError):
                pureftpd.passwd_entry(line)

    def test_bytes_survive(self):
        entry = pureftpd.passwd_entry(b"j\xf6e:*:1:1:g\xff:/h\xe9::::::::\xff.example")
        self.assertEqual((entry.login, entry.gecos, entry.home), (b"j\xf6e", b"g\xff", b"/h\xe9"))
        self.assertEqual(entry.allow_local.encode("utf-8", "surrogateescape"), b"\xff.example")


class Database(Files):
    def find_all(self, records):
        self.write(pureftpd.puredb_build(records))
        return [pureftpd.puredb_find(self.path, key) for key, _ in records]

    def test_hash(self):
        self.assertEqual(pureftpd.puredb_hash(b""), 5381)
        self.assertEqual(pureftpd.puredb_hash(b"ab"), (5381 * 33 ^ 98) * 33 ^ 97)
        self.assertLess(pureftpd.puredb_hash(b"\xff" * 3000), 1 << 32)

    def test_everybody_is_found_and_nobody_else(self):
        for count in (0, 1, 2, 300, 3000):
            with self.subTest(count):
                records = [(b"user%d" % i, b"value %d" % i) for i in range(count)]
                self.assertEqual(self.find_all(records), [value for _, value in records])
                for stranger in (b"", b"user", b"user%d" % count, b"USER0", b"x" * 4000, b"\0"):
                    self.assertIsNone(pureftpd.puredb_find(self.path, stranger))

    def test_the_first_of_doubled_logins_wins_and_colliding_ones_are_told_apart(self):
        wanted = pureftpd.puredb_hash(b"aa")
        twin = next(bytes([i, j]) for i in range(256) for j in range(256)
                    if (i, j) != (97, 97) and pureftpd.puredb_hash(bytes([i, j])) == wanted)
        self.find_all([(b"aa", b"1"), (twin, b"2"), (b"aa", b"3"), (b"", b"4")])
        self.assertEqual([pureftpd.puredb_find(self.path, key) for key in (b"aa", twin, b"")], [b"1", b"2", b"4"])

    def test_a_new_database_counts_at_once(self):
        pureftpd.puredb_write(self.path, lambda: [(b"joe", b"1")])
        self.assertEqual(pureftpd.puredb_find(self.path, b"joe"), b"1")
        pureftpd.puredb_write(self.path, lambda: [(b"joe", b"2")])
        self.assertEqual(pureftpd.puredb_find(self.path, b"joe"), b"2")
        self.assertEqual(os.stat(self.path).st_mode & 0o7777, 0o600)

    def test_what_is_no_database_is_an_error_with_path_and_reason(self):
        good = pureftpd.puredb_build([(b"joe", b"1")])
        self.write(b"", "empty")
        self.write(b"PDB1" + good[4:], "older")
        self.write(good[:500], "short")
        self.write(b"PDB2" + b"\0" * 2000, "zeros")
        self.write(b"PDB2" + b"\xff" * 2000, "ones")
        os.mkdir(os.path.join(self.directory, "directory"))
        os.mkfifo(os.path.join(self.directory, "fifo"))
        for name in ("missing", "empty", "older", "short", "zeros", "ones", "directory", "fifo"):
            path = os.path.join(self.directory, name)
            for function in (pureftpd.puredb_find, pureftpd.puredb_sample):
                with self.subTest(name), self.assertRaisesRegex(pureftpd.PureDBError, path + ": .+"):
                    function(path, b"joe")

    def test_damage_is_an_error_or_no_answer_but_never_a_crash(self):
        records = [(b"user%d" % i, b"%d:" % i + HASH) for i in range(40)]
        good = pureftpd.puredb_build(records)
        chance = random.Random(5)
        before = len(os.listdir("/dev/fd"))
        for turn in range(400):
            bad = bytearray(good[:chance.randrange(len(good))] if turn % 2 else good)
            for _ in range(chance.randrange(1, 6)):
                place = chance.randrange(max(1, len(bad) - 4))
                bad[place:place + 4] = struct.pack(">I", chance.choice((0, 1, 4, 1032, len(good), 1 << 31, 0xFFFFFFFF)))
            self.write(bad)
            for key, _ in records[:8]:
                for function in (pureftpd.puredb_find, pureftpd.puredb_sample):
                    try:
                        function(self.path, key)
                    except pureftpd.PureDBError as error:
                        self.assertIn(self.path, str(error))
        self.assertEqual(len(os.listdir("/dev/fd")), before)

    def test_a_lookup_among_100000_takes_less_than_a_millisecond(self):
        records = [(b"user%d" % i, b"x" * 100) for i in range(100000)]
        start = time.process_time()
        data = pureftpd.puredb_build(records)
        self.assertLess(time.process_time() - start, 1.0)
        self.write(data)
        times = []
        for i in range(0, 100000, 1000):
            start = time.perf_counter()
            self.assertEqual(len(pureftpd.puredb_find(self.path, b"user%d" % i)), 100)
            times.append(time.perf_counter() - start)
        self.assertLess(statistics.median(times), 0.001)

    def test_more_than_four_gigabytes_are_refused(self):
        class Endless(bytes):
            def __len__(self):
                return 1 << 31
        with mock.patch.object(pureftpd.struct, "Struct", lambda _: mock.Mock(pack=lambda n: b"")), \
                self.assertRaisesRegex(ValueError, "4 GiB"):
            pureftpd.puredb_build([(b"a", Endless()), (b"b", Endless())])

    @unittest.skipUnless(PURE_PW, "needs the original's pure-pw")
    def test_the_same_bytes_as_the_original(self):
        for records in ([], [(b"joe", b"1")], [(b"u%d" % (i * i), HASH + b":%d" % i) for i in range(2000)],
                        [(b"aa", b"1"), (b"b", b"2"), (b"aa", b"3"), (b"", b"4"), (b"\xff\x80z", b":")]):
            with self.subTest(len(records)):
                text = self.write(b"".join(key + b":" + value + b"\n" for key, value in records), "text")
                subprocess.run([PURE_PW, "mkdb", os.path.join(self.directory, "theirs"), "-f", text], check=True)
                self.assertEqual(pureftpd.puredb_build(records), self.read("theirs"))


class Samples(Files):
    def sample(self, records, key=b"nobody"):
        self.write(pureftpd.puredb_build(records))
        return pureftpd.puredb_sample(self.path, key)

    def test_a_missing_user_gets_the_hash_of_a_neighbour(self):
        self.assertEqual(self.sample([]), "")
        self.assertEqual(self.sample([(b"joe", HASH + b":1:1::/")]), HASH.decode())
        self.assertEqual(self.sample([(b"joe", b"*:1:1::/"), (b"jim", b"!"), (b"jon", HASH + b":1")]), HASH.decode())
        self.assertEqual(self.sample([(b"joe%d" % i, b"*:1:1::/") for i in range(1000)]), "")

    def test_the_same_name_always_gets_the_same_and_names_get_all_kinds(self):
        kinds = (HASH, b"$1$salt$aaaaaaaaaaaaaaaaaaaaaa")
        records = [(b"user%d" % i, kinds[i % 2] + b":1:1::/") for i in range(100)]
        samples = [self.sample(records, b"stranger%d" % i) for i in range(60)]
        self.assertEqual(samples, [pureftpd.puredb_sample(self.path, b"stranger%d" % i) for i in range(60)])
        self.assertTrue(15 < samples.count(HASH.decode()) < 45)


class Replacing(Files):
    def replace(self, data, name="users.pdb"):
        with pureftpd.Replacement(os.path.join(self.directory, name)) as new:
            new.write(data)

    def test_mode_contents_and_nothing_left(self):
        self.write(b"old")
        os.chmod(self.path, 0o644)
        self.replace(b"new")
        self.assertEqual(self.read(), b"new")
        self.assertEqual(os.stat(self.path).st_mode & 0o7777, 0o600)
        self.assertEqual(os.listdir(self.directory), ["users.pdb"])

    def test_an_exception_keeps_the_old(self):
        self.write(b"old")
        with self.assertRaises(ZeroDivisionError), pureftpd.Replacement(self.path) as new:
            new.write(b"new")
            raise ZeroDivisionError
        self.assertEqual(self.read(), b"old")
        self.assertEqual(os.listdir(self.directory), ["users.pdb"])

    @unittest.skipUnless(os.geteuid() == 0, "needs root")
    def test_the_owner_stays(self):
        self.write(b"old")
        os.chown(self.path, 1234, 4321)
        self.replace(b"new")
        self.assertEqual((os.stat(self.path).st_uid, os.stat(self.path).st_gid), (1234, 4321))

    def test_a_link_stays_a_link(self):
        self.write(b"old", "real")
        os.symlink("real", self.path)
        self.replace(b"new")
        self.assertTrue(os.path.islink(self.path))
        self.assertEqual(self.read("real"), b"new")

    def test_twenty_at_once_lose_nothing(self):
        def add(number):
            def run():
                with pureftpd.Replacement(self.path) as new:
                    new.write(self.read() + b"%d\n" % number)
            return run
        self.write(b"")
        self.assertEqual(self.in_children(*map(add, range(20))), [0] * 20)
        self.assertEqual(sorted(self.read().split()), sorted(b"%d" % i for i in range(20)))
        self.assertEqual(os.listdir(self.directory), ["users.pdb"])

    def test_killed_at_any_step_it_leaves_the_old_or_the_new_and_the_next_one_works(self):
        def killed(step):
            def run():
                with mock.patch.object(os, step, lambda *_: os.kill(os.getpid(), signal.SIGKILL)):
                    self.replace(b"new")
            return run
        for step in ("write", "fsync", "rename", "fchmod", "close"):
            with self.subTest(step):
                self.write(b"old")
                self.assertEqual(self.in_children(killed(step)), [signal.SIGKILL])
                self.assertEqual(self.read(), b"old" if step in ("write", "fsync", "rename") else b"new")
                self.replace(b"newer")
                self.assertEqual(self.read(), b"newer")
                self.assertEqual(os.listdir(self.directory), ["users.pdb"])
                self.assertEqual(os.stat(self.path).st_mode & 0o7777, 0o600)
                os.unlink(self.path)

    def test_the_tmp_of_another_program_is_in_the_way(self):
        temporary = self.write(b"theirs", "users.pdb.tmp")
        os.chmod(temporary, 0o600)
        with self.assertRaises(FileExistsError):
            self.replace(b"ours")
        self.assertEqual(self.read("users.pdb.tmp"), b"theirs")
        os.unlink(temporary)
        os.symlink("elsewhere", temporary)
        with self.assertRaises(OSError):
            self.replace(b"ours")
        self.assertEqual(os.listdir(self.directory), ["users.pdb.tmp"])


# ==== Tests: access ===============================================================================


class Lines(list):
    """A log that collects (level, text)."""

    def __getattr__(self, level):
        return lambda text: self.append((level, text))


class AccessRules(unittest.TestCase):
    ALLOWED = (         # address, allow, deny: in
        ("10.0.0.1",        "",                             ""),
        ("10.0.0.1",        "10.0.0.1",                     ""),
        ("10.0.0.1",        "192.0.2.1,10.0.0.0/8",         ""),
        ("10.0.0.1",        ",10.0.0.1",                    ""),
        ("10.0.0.1",        " 192.0.2.1 , 10.0.0.1 ",       ""),
        ("10.0.0.1",        "010.000.000.001",              ""),
        ("10.0.0.1",        "10.9.9.9/8",                   ""),            # host bits may be set
        ("10.0.0.1",        "10.0.0.0/31",                  ""),
        ("::ffff:10.0.0.1", "10.0.0.0/8",                   ""),
        ("10.0.0.1",        "::ffff:10.0.0.0/104",          ""),
        ("10.0.0.1",        "::ffff:10.0.0.1",              ""),
        ("10.0.0.1",        "",                             "10.0.0.2,10.1.0.0/16"),
        ("10.0.0.1",        "10.0.0.0/8",                   "10.0.0.0/32,10.0.0.2"),
        ("2001:db8::1",     "2001:db8::/32",                ""),
        ("2001:db8::1",     "2001:DB8:0:0::1",              "2001:db8::2"),
        ("2001:db8::1",     "10.0.0.0/8,2001:db8::/127",    ""),
        ("2001:db8::1",     "",                             "10.0.0.0/8"),  # the other family never matches
        ("10.0.0.1",        "",                             "2001:db8::/32"),
        ("fe80::1%eth0",    "fe80::/10",                    ""),
        ("127.0.0.1",       "localhost",                    ""),
        ("127.0.0.0",       "127.0",                        ""),            # Compat: a host name
    )
    REFUSED = (
        ("10.0.0.1",        "10.0.0.2",                     ""),
        ("10.0.0.1",        "10.0.0.2/31",                  ""),
        ("10.0.0.1",        "",                             "10.0.0.1"),
        ("10.0.0.1",        "",                             "192.0.2.1,10.0.0.0/8"),
        ("10.0.0.1",        "10.0.0.0/8",                   "10.0.0.1"),
        ("10.0.0.1",        "192.0.2.0/24",                 "192.0.2.1"),
        ("10.0.0.1",        ",",                            ""),
        ("::ffff:10.0.0.1", "",                             "10.0.0.0/8"),
        ("2001:db8::1",     "10.0.0.0/8",                   ""),
        ("2001:db8::1",     "",                             "2001:db8::/32"),
        ("2001:db8::1",     "2001:db8::/127",               "2001:db8::1"),
        ("::1",             "127.0.0.1",                    ""),
        ("127.0.0.1",       "",                             "localhost"),
        ("10.0.0.1",        "localhost",                    ""),
    )
    MALFORMED = ("10.0.0.0/0", "10.0.0.0/33", "10.0.0.0/255.0.0.0", "10.0.0.0/-1", "10.0.0.0/", "10.0.0.0/8x",
                 "10.0.0.1x!", "10.0.0.256", "10.0.0.1/8/8",
                 "2001:db8::/0", "2001:db8::/129", "2001:db8::/x", "2001:db8:::1", ":",
                 "host.example/24", "*", "10.*", "a b", "-", "\u0661\u0660.0.0.1", "10.0.0.1-10.0.0.9 ",
                 "h\u00f6st.example")

    def test_who_is_allowed(self):
        for address, allow, deny in self.ALLOWED:
            with self.subTest(address=address, allow=allow, deny=deny):
                log = Lines()
                self.assertTrue(access_allows(address, allow, deny, log))
                self.assertEqual(log, [])

    def test_who_is_refused(self):
        for address, allow, deny in self.REFUSED:
            with self.subTest(address=address, allow=allow, deny=deny):
                self.assertFalse(access_allows(address, allow, deny, Lines()))

    def test_a_malformed_item_refuses_wherever_it_stands_and_is_logged(self):
        for item in self.MALFORMED:
            for allow, deny in ((item, ""), ("", item), ("10.0.0.1," + item, ""), ("10.0.0.1", item + ",192.0.2.1")):
                with self.subTest(allow=allow, deny=deny):
                    log = Lines()
                    self.assertFalse(access_allows("10.0.0.1", allow, deny, log))
                    self.assertEqual([level for level, _ in log], ["warning"])
                    self.assertIn("[" + item.strip() + "]", log[0][1])

    def test_a_name_that_cannot_be_resolved_matches_nobody_who_is_allowed_and_everybody_who_is_denied(self):
        name = "no-such-host.invalid"
        for allow, deny, expected in ((name, "", False), ("", name, False), (name + ",10.0.0.2", "", False),
                                      ("10.0.0.1", name, False)):
            with self.subTest(allow=allow, deny=deny):
                log = Lines()
                self.assertIs(access_allows("10.0.0.1", allow, deny, log), expected)
                self.assertIn(name, log[0][1])

    def test_no_name_is_asked_for_where_an_address_decides(self):
        with mock.patch.object(socket, "getaddrinfo", side_effect=AssertionError):
            for allow, deny, expected in (("slow.example,10.0.0.1", "", True), ("", "slow.example,10.0.0.0/8", False)):
                log = Lines()
                self.assertIs(access_allows("10.0.0.1", allow, deny, log), expected)
                self.assertEqual(log, [])

    def test_names_are_resolved_in_the_family_of_the_client(self):
        found = {entry[0] for entry in socket.getaddrinfo("localhost", None)}
        for address, family in (("127.0.0.1", socket.AF_INET), ("::1", socket.AF_INET6)):
            with self.subTest(address):
                log = Lines()
                self.assertEqual(access_allows(address, "localhost", "", log), family in found)
                self.assertEqual(access_allows(address, "", "localhost", log), family not in found)
                self.assertEqual(log, [])

    def test_an_address_that_is_none_is_refused_by_any_rule(self):
        self.assertTrue(access_allows("", "", "", Lines()))
        self.assertFalse(access_allows("", "", "10.0.0.1", Lines()))
        self.assertFalse(access_allows("", "localhost", "", Lines()))

    def test_address_text(self):
        for text, expected in (("10.0.0.1", "10.0.0.1"), ("::ffff:10.0.0.1", "10.0.0.1"), ("fe80::1%eth0", "fe80::1"),
                               ("::ffff:0:1", "::ffff:0:1"), ("", "")):
            self.assertEqual(address_text(text), expected)

    def test_trusted_addresses(self):
        peer = Peer("192.0.2.1", 4000, "::ffff:10.0.0.1", 21)
        for trusted, expected in (((), True), (("10.0.0.1",), True), (("10.0.0.2",), False),
                                  (("::1", "10.0.0.1"), True), (("::ffff:10.0.0.1",), True), (("192.0.2.1",), False)):
            self.assertIs(access_is_trusted(trusted, peer), expected, trusted)


class TimeRules(unittest.TestCase):
    def at(self, clock):
        """A time stamp at which local clocks show `clock`."""
        today = time.localtime(1700000000)
        return time.mktime((today.tm_year, today.tm_mon, today.tm_mday, clock // 100, clock % 100, 59, 0, 0, -1))

    def test_both_ends_count_and_midnight_is_no_end(self):
        for restriction, clock, expected in (
                ("", 300, True),
                ("900-1800", 859, False), ("900-1800", 900, True), ("900-1800", 1800, True), ("900-1800", 1801, False),
                ("0900-1800", 900, True), ("0-2359", 0, True), ("0-2359", 2359, True), ("0-0", 0, True),
                ("0-0", 1, False),
                ("2200-600", 2159, False), ("2200-600", 2200, True), ("2200-600", 2359, True), ("2200-600", 0, True),
                ("2200-600", 600, True), ("2200-600", 601, False), ("1200-1159", 1159, True), ("1200-1159", 1200, True),
                ("0-2400", 2359, True)):
            with self.subTest(restriction=restriction, clock=clock):
                self.assertIs(access_now(restriction, self.at(clock), Lines()), expected)

    def test_a_malformed_restriction_refuses_and_is_logged(self):
        for restriction in ("900", "-", "900-", "-1800", "9:00-18:00", "900-1800x", "900-1800-2000", "always", " ",
                            "\u0669-2359"):
            with self.subTest(restriction):
                log = Lines()
                self.assertFalse(access_now(restriction, self.at(1200), log))
                self.assertIn(f"[{restriction}]", log[0][1])


class RecordRules(unittest.TestCase):
    def check(self, **fields):
        entry = pureftpd.PasswdEntry(b"joe", "*", 1000, 1000, b"", b"/home/joe")._replace(**fields)
        log = Lines()
        try:
            pureftpd.access_check(entry, Peer("192.0.2.1", 4000, "10.0.0.1", 21), time.time(), log)
        except pureftpd.Refused as refusal:
            return str(refusal)

    def test_the_reason_names_the_rule(self):
        for fields, reason in (
                ({}, None),
                ({"allow_client": "192.0.2.0/24", "allow_local": "10.0.0.1", "deny_client": "10.0.0.1",
                  "deny_local": "192.0.2.1", "time": "0-2359"}, None),
                ({"allow_client": "10.0.0.1"}, "192.0.2.1"),
                ({"deny_client": "192.0.2.1"}, "192.0.2.1"),
                ({"allow_local": "192.0.2.1"}, "10.0.0.1"),
                ({"deny_local": "10.0.0.0/8"}, "10.0.0.1"),
                ({"time": "never"}, "time")):
            with self.subTest(fields):
                if reason is None:
                    self.assertIsNone(self.check(**fields))
                else:
                    self.assertIn(reason, self.check(**fields))


# ==== Tests: backends =============================================================================


PEER = Peer("192.0.2.1", 4000, "::ffff:10.0.0.1", 21, True, "ftp.example")
JOEHASH = (pureftpd.crypt_in_python(b"secret", b"$1$saltsalt$") or b"").decode()
SLOWHASH = (pureftpd.crypt_in_python(b"secret", b"$6$rounds=20000$saltsalt$") or b"").decode()
ORIGINALS = os.pathsep.join((os.environ.get("PATH", ""), "/usr/sbin", "/opt/pureftpd-orig/usr/sbin"))


class BackendsLines(list):
    """A log that collects (level, text)."""

    def __getattr__(self, level):
        return lambda text: self.append((level, text))


def login_options(*login, trustedip=(), minuid=0):
    return types.SimpleNamespace(login=login, trustedip=trustedip, minuid=minuid)


class BackendTest(unittest.TestCase):
    def setUp(self):
        directory = tempfile.TemporaryDirectory()
        self.addCleanup(directory.cleanup)
        self.directory = directory.name
        self.log = BackendsLines()

    def path(self, name):
        return os.path.join(self.directory, name)

    def puredb(self, *lines, name="users.pdb"):
        """The path of a database made of lines "login:rest"."""
        records = [tuple(line.encode().split(b":", 1)) for line in lines]
        with open(self.path(name), "wb") as file:
            file.write(pureftpd.puredb_build(records))
        return self.path(name)

    def login(self, *chain, user=b"joe", password=b"secret", peer=PEER, **more):
        return pureftpd.authenticate(login_options(*chain, **more), user, password, peer, self.log)

    def refused(self, *chain, **more):
        with self.assertRaises(Refused) as caught:
            self.login(*chain, **more)
        return str(caught.exception)


def sqlite_database(test, *rows, schema=pureftpd.SQLITE_SCHEMA):
    path = test.path("users%?#.sqlite")
    with contextlib.closing(sqlite3.connect(path)) as connection, connection:
        connection.execute(schema)
        for row in rows:
            row = dict(zip(pureftpd.PASSWD_FIELDS, row)) if isinstance(row, tuple) else dict(row)
            row = {"uid": 1001, "gid": 1002, "home": "/home/joe", **row}
            marks = ", ".join("?" * len(row))
            connection.execute(f"INSERT INTO users ({', '.join(row)}) VALUES ({marks})", tuple(row.values()))
    return path


class PureDBBackend(BackendTest):
    def test_every_field_arrives(self):
        path = self.puredb(f"joe:{JOEHASH}:1001:1002:Joe Doe:/home/joe/./:1:2:3:4:5:6:7:10.0.0.1::192.0.2.0/24::0-2359")
        account = self.login(("puredb", path))
        self.assertEqual(account, pureftpd.Account(
            b"joe", 1001, 1002, b"/home/joe/./", account.groups, b"Joe Doe", 1, 2, 3, 4, 6, 7, 5, backend="puredb"))
        self.assertIn(1002, account.groups)
        self.assertEqual(self.log, [])

    def test_fields_may_be_missing(self):
        account = self.login(("puredb", self.puredb(f"joe:{JOEHASH}:1001:1002::/home/joe")))
        self.assertEqual(account, pureftpd.Account(b"joe", 1001, 1002, b"/home/joe", account.groups, backend="puredb"))

    def test_zero_is_no_limit_of_sessions_and_a_quota_of_nothing(self):
        account = self.login(("puredb", self.puredb(f"joe:{JOEHASH}:1001:1002::/home/joe:0:0:0:0:0:0:0")))
        self.assertEqual(account[6:13], (0, 0, 0, 0, 0, 0, 0))

    def test_refusals_say_why(self):
        good = "1001:1002::/home/joe"
        for record, password, reason in (
                (f"{JOEHASH}:{good}", b"wrong", "wrong password"),
                (f"{JOEHASH}:{good}", b"", "wrong password"),
                (f"*:{good}", b"*", "wrong password"),
                (f"!{JOEHASH}:{good}", b"secret", "wrong password"),
                (f":{good}", b"", "wrong password"),
                (f"secret:{good}", b"secret", "wrong password"),
                (f"{JOEHASH}:0:1002::/home/joe", b"secret", "uid"),
                (f"{JOEHASH}:1001:0::/home/joe", b"secret", "gid"),
                (f"{JOEHASH}:1001x:1002::/home/joe", b"secret", "uid"),
                (f"{JOEHASH}:4294967295:1002::/home/joe", b"secret", "uid"),
                (f"{JOEHASH}:-1:1002::/home/joe", b"secret", "uid"),
                (f"{JOEHASH}:1001:1002::home/joe", b"secret", "home"),
                (f"{JOEHASH}:1001:1002:", b"secret", "malformed"),
                (JOEHASH, b"secret", "malformed"),
                (f"{JOEHASH}:{good}:x", b"secret", "bandwidth_ul"),
                (f"{JOEHASH}:{good}{':' * 8}192.0.2.1", b"secret", "10.0.0.1"),
                (f"{JOEHASH}:{good}{':' * 10}10.0.0.1", b"secret", "192.0.2.1"),
                (f"{JOEHASH}:{good}{':' * 11}192.0.2.1/0", b"secret", "192.0.2.1"),
                (f"{JOEHASH}:{good}{':' * 12}9-", b"secret", "time")):
            with self.subTest(record=record, password=password):
                self.assertIn(reason, self.refused(("puredb", self.puredb("joe:" + record)), password=password))

    def test_a_database_that_is_missing_or_damaged_lets_nobody_in(self):
        with open(self.path("broken"), "wb") as file:
            file.write(b"PDB3" + bytes(3000))
        other = self.puredb(f"joe:{JOEHASH}:1001:1002::/home/joe")
        for path in (self.path("nothing"), self.path("broken"), self.directory):
            with self.subTest(path), self.assertRaisesRegex(BackendBroken, path):
                self.login(("puredb", path), ("puredb", other))

    def test_a_hash_that_cannot_be_checked_is_an_error_in_the_log_and_no_login(self):
        path = self.puredb("joe:$99$abc$def:1001:1002::/home/joe")
        self.assertEqual(self.refused(("puredb", path)), "wrong password")
        self.assertEqual([level for level, _ in self.log], ["error"])
        self.assertIn("joe", self.log[0][1])
        self.assertNotIn("secret", str(self.log))


class Chain(BackendTest):
    def test_not_found_goes_on_and_a_wrong_password_stops(self):
        one = self.puredb(f"joe:{JOEHASH}:1001:1001::/one", name="one")
        two = self.puredb(f"joe:{SLOWHASH}:1002:1002::/two", f"ann:{SLOWHASH}:1003:1003::/two", name="two")
        chain = ("puredb", one), ("puredb", two)
        self.assertEqual(self.login(*chain).home, b"/one")
        self.assertEqual(self.login(*chain, user=b"ann").home, b"/two")
        self.assertEqual(self.refused(*chain, password=b"wrong"), "wrong password")
        self.assertEqual(self.refused(*chain, user=b"bob"), "no such user")
        self.assertEqual(self.refused(*chain, user=b"Joe"), "no such user")

    def test_minimum_uid(self):
        path = self.puredb(f"joe:{JOEHASH}:1001:1001::/one")
        self.assertEqual(self.login(("puredb", path), minuid=1001).uid, 1001)
        self.assertIn("1001", self.refused(("puredb", path), minuid=1002))

    def test_trusted_addresses(self):
        path = self.puredb(f"joe:{JOEHASH}:1001:1001::/one")
        self.assertTrue(self.login(("puredb", path), trustedip=("10.0.0.1",)))
        self.assertIn("-V", self.refused(("puredb", path), trustedip=("10.0.0.2",)))

    def test_names_and_passwords_that_break_lines_are_refused(self):
        path = self.puredb(f"joe:{JOEHASH}:1001:1001::/one")
        for user, password in ((b"", b"secret"), (b"joe\n", b"secret"), (b"joe", b"secret\0"), (b"joe", b"se\rcret")):
            self.refused(("puredb", path), user=user, password=password)

    def test_a_missing_user_costs_what_a_wrong_password_costs(self):
        path = self.puredb(*(f"u{i}:{SLOWHASH}:1001:1001::/one" for i in range(20)), "locked:*:1001:1001::/one")
        base = sqlite_database(self, *((f"u{i}", SLOWHASH) for i in range(20)))
        for chain in ((("puredb", path),), (("sqlite", base),)):
            costs = settled_costs(0.2, [functools.partial(self.refused, *chain, user=user, password=b"wrong")
                                        for user in (b"u7", b"nobody-of-that-name", b"locked")])
            self.assertTrue(costs_agree(0.2, costs), (chain, costs))

    def test_preload(self):
        pureftpd.authentication_preload(login_options(("puredb", self.path("later"))), self.log)
        self.assertIn("later", self.log[0][1])
        good = self.puredb(f"joe:{JOEHASH}:1001:1001::/one")
        pureftpd.authentication_preload(login_options(("puredb", good)), self.log)
        self.assertEqual(len(self.log), 1)
        pureftpd.authentication_preload(login_options())
        with self.assertRaisesRegex(ConfigError, "107"):
            pureftpd.authentication_preload(login_options(("extauth", "/" + "x" * 110)))

    def test_the_table_has_a_row_for_each_method_that_is_offered(self):
        offered = {name for name, (_, why_not) in pureftpd.LOGIN_METHODS.items() if not why_not}
        self.assertEqual(offered, set(pureftpd.AUTH_BACKENDS))


class SQLiteBackend(BackendTest):
    def database(self, *rows, **more):
        with contextlib.suppress(FileNotFoundError):
            os.unlink(self.path("users%?#.sqlite"))
        return sqlite_database(self, *rows, **more)

    def test_every_field_arrives(self):
        path = self.database(("joe", JOEHASH, 1001, 1002, "Jo\u00e9", "/home/jo\u00e9", 1, 2, 3, 4, 5, 6, 7,
                              "10.0.0.1,::1", None, "192.0.2.0/24,2001:db8::/32", "", "0-2359"))
        account = self.login(("sqlite", path))
        self.assertEqual(account, pureftpd.Account(
            b"joe", 1001, 1002, "/home/jo\u00e9".encode(), account.groups, "Jo\u00e9".encode(), 1, 2, 3, 4, 6, 7, 5,
            backend="sqlite"))
        other = self.login(("sqlite", path), peer=PEER._replace(address="2001:db8::1"))
        self.assertEqual(other, account)
        self.assertIn("2001:db9::1", self.refused(("sqlite", path), peer=PEER._replace(address="2001:db9::1")))

    def test_refusals(self):
        for row, reason in (({"hash": JOEHASH, "uid": 0}, "uid"), ({"hash": JOEHASH, "uid": 1.5}, "uid"),
                            ({"hash": JOEHASH, "uid": "1' OR 1"}, "uid"), ({"hash": "*"}, "wrong password"),
                            ({"hash": JOEHASH, "home": "x"}, "home"),
                            ({"hash": JOEHASH, "deny_client": "192.0.2.0/33"}, "192.0.2.1"),
                            ({"hash": JOEHASH, "quota_size": -1}, "quota_size"),
                            ({"hash": JOEHASH, "time": "x"}, "time")):
            with self.subTest(row):
                self.assertIn(reason, self.refused(("sqlite", self.database({"login": "joe", **row}))))
        path = self.database({"login": "joe", "hash": JOEHASH})
        for user in (b"' OR 1=1 --", b"jo%", b"jo\xe9", b"JOE"):
            self.assertEqual(self.refused(("sqlite", path), user=user), "no such user")

    def test_what_cannot_be_read_lets_nobody_in(self):
        other = self.puredb(f"joe:{JOEHASH}:1001:1002::/home/joe")
        with open(self.path("garbage"), "wb") as file:
            file.write(b"garbage" * 1000)
        old = self.database(schema="CREATE TABLE users (login, hash, uid, gid, home)")
        colon = self.path("colon.sqlite")
        os.rename(self.database({"login": "joe", "hash": JOEHASH, "gecos": "a:0:0:b:/"}), colon)
        for path in (self.path("nothing"), self.path("garbage"), old, colon):
            with self.subTest(path), self.assertRaisesRegex(BackendBroken, "sqlite"):
                self.login(("sqlite", path), ("puredb", other))
        self.assertFalse(os.path.exists(self.path("nothing")))


class UnixBackend(BackendTest):
    def test_shells_and_expiry(self):
        shadow = pureftpd.ShadowEntry
        shells = {"/bin/sh"}
        for shell, entry, reason in (
                ("/bin/sh", None, ""), ("ftp", None, ""), ("FTP", None, ""), ("/bin/false", None, "shell"),
                ("", None, "shell"),
                ("/bin/sh", shadow("h", 19000, 99999, -1), ""), ("/bin/sh", shadow("h", -1, -1, -1), ""),
                ("/bin/sh", shadow("h", 19000, -1, 20000), ""), ("/bin/sh", shadow("h", 19000, -1, 19999), "account"),
                ("/bin/sh", shadow("h", 19900, 100, -1), ""), ("/bin/sh", shadow("h", 19899, 100, -1), "password"),
                ("/bin/sh", shadow("h", 0, 100, 0), "")):
            with self.subTest(shell=shell, entry=entry):
                self.assertIn(reason, pureftpd.unix_objection(shell, entry, shells, 20000))
                self.assertEqual(bool(reason), bool(pureftpd.unix_objection(shell, entry, shells, 20000)))

    def test_shadow_lines(self):
        with open(self.path("shadow"), "w") as file:
            file.write("root:*:19000:0:99999:7:::\n" + "x" * 9000 + "\njoe:h:19000:0:90:7:30:20000:\nann:!h::::::\n"
                       f"bob:{JOEHASH}:19000::::::\nbad:h:x::::::\nshort:h\n")
        for user, expected in ((b"joe", ("h", 19000, 90, 20000)), (b"bob", (JOEHASH, 19000, -1, -1)), (b"jo", None),
                               (b"x", None), (b"", None)):
            self.assertEqual(pureftpd.shadow_find(user, self.path("shadow")), expected)
        self.assertRaises(ValueError, pureftpd.shadow_find, b"bad", self.path("shadow"))
        self.assertRaises(IndexError, pureftpd.shadow_find, b"short", self.path("shadow"))
        self.assertRaises(OSError, pureftpd.shadow_find, b"joe", self.path("none"))
        self.assertEqual(pureftpd.shadow_sample(None, b"joe", self.path("shadow")), JOEHASH)
        self.assertEqual(pureftpd.shadow_sample(None, b"joe", self.path("none")), "")

    def test_shells_file(self):
        with open(self.path("shells"), "w") as file:
            file.write("# comment\n\n/bin/sh\n/bin/zsh \nnot-a-path\n")
        self.assertEqual(pureftpd.shells_read(self.path("shells")), {"/bin/sh", "/bin/zsh"})
        self.assertEqual(pureftpd.shells_read(self.path("none")), {"/bin/sh", "/bin/csh"})

    @unittest.skipUnless(os.geteuid() == 0, "needs root")
    def test_system_users(self):
        self.assertEqual(self.refused(("unix", None), user=b"no-such-user"), "no such user")
        for user in (b"root", b"daemon", b"nobody"):
            self.assertEqual(self.refused(("unix", None), user=user, password=b"certainly wrong"), "wrong password")

    def test_root_is_refused_by_every_back_end(self):
        account = pureftpd.Account(b"root", 0, 0, b"/root")
        row = pureftpd.Backend(lambda *_: account, lambda *_: "")
        table = dict(pureftpd.AUTH_BACKENDS)
        self.addCleanup(pureftpd.AUTH_BACKENDS.update, table)
        pureftpd.AUTH_BACKENDS["unix"] = row
        self.assertIn("uid 0", self.refused(user=b"root"))

    def test_groups(self):
        self.assertIn(0, pureftpd.groups_of("root", 0, 0))
        self.assertIn(0, pureftpd.groups_of(None, 0, 0))
        self.assertEqual(pureftpd.groups_of(None, 3999999999, 17), (17,))


def pam_missing():
    try:
        return "" if hasattr(pureftpd.pam_library(), "pam_start_confdir") else "libpam without pam_start_confdir"
    except (OSError, ImportError) as error:
        return str(error)


@unittest.skipIf(pam_missing(), pam_missing())
class PAMBackend(BackendTest):
    """Real modules under a directory of services of our own."""
    PERMIT = "auth required pam_permit.so\naccount required pam_permit.so\nsession required pam_permit.so\n"

    def check(self, service, user=b"daemon", password=b"secret"):
        with open(self.path("pure-ftpd"), "w") as file:
            file.write(service)
        return pureftpd.pam_check(None, user, password, PEER, self.log, os.fsencode(self.directory))

    def test_phases(self):
        account = self.check(self.PERMIT)
        self.assertEqual((account.name, account.backend, account.tilde), (b"daemon", "pam", True))
        self.assertIn(account.gid, account.groups)
        self.assertIsNone(self.check(self.PERMIT, b"no-such-user"))
        for phase, reason in (("auth", "authentication"), ("account", "account")):
            with self.subTest(phase), self.assertRaisesRegex(Refused, reason):
                self.check(self.PERMIT.replace(phase + " required pam_permit", phase + " required pam_deny"))
        self.assertEqual(self.log, [])

    def test_a_session_that_cannot_be_opened_is_logged(self):
        self.assertTrue(self.check(self.PERMIT.replace("session required pam_permit", "session required pam_deny")))
        self.assertEqual([level for level, _ in self.log], ["warning"])

    def test_a_module_that_is_missing_lets_nobody_in(self):
        with self.assertRaises((Refused, BackendBroken)):
            self.check(self.PERMIT.replace("auth required pam_permit.so", "auth required pam_no_such_module.so"))

    def test_modules_learn_password_and_client(self):
        with open(self.path("program"), "w") as file:
            file.write("#!/bin/sh\nread -r word\ntest \"$word\" = secret &&\n"
                       f"echo \"$word $PAM_USER $PAM_RHOST $PAM_TTY $PAM_SERVICE\" >{self.path('said')}\n")
        os.chmod(self.path("program"), 0o755)
        service = self.PERMIT.replace("auth required pam_permit.so",
                                      f"auth required pam_exec.so quiet expose_authtok {self.path('program')}\n"
                                      "auth required pam_permit.so")
        self.assertEqual(self.check(service).name, b"daemon")
        with open(self.path("said")) as file:
            self.assertEqual(file.read().replace("\0", ""), "secret daemon 192.0.2.1 pure-ftpd pure-ftpd\n")
        with self.assertRaisesRegex(Refused, "authentication"):
            self.check(service, password=b"wrong")

    @unittest.skipUnless(os.geteuid() == 0, "needs root")
    def test_pam_unix_refuses_without_sleeping(self):
        service = self.PERMIT.replace("auth required pam_permit", "auth required pam_unix")
        start = time.monotonic()
        with self.assertRaises(Refused):
            self.check(service)
        self.assertIsNone(self.check(service, b"no-such-user"))
        self.assertLess(time.monotonic() - start, 1.5)


class ExtauthAnswers(unittest.TestCase):
    GOOD = b"auth_ok:1\nuid:42\ngid:21\ndir:/home/j/./\nend\n"

    def test_accounts(self):
        account = pureftpd.extauth_account(b"j", self.GOOD)
        self.assertEqual(account, pureftpd.Account(b"j", 42, 21, b"/home/j/./", account.groups, backend="extauth"))
        full = (b"uid: 42\ngid:\t21\ndir:relative\nunknown:7\ndir:/x\nslow_tilde_expansion:0\n"
                b"throttling_bandwidth_ul:1\nthrottling_bandwidth_dl:2\nuser_quota_size:3\nuser_quota_files:4\n"
                b"ratio_upload:5\nratio_download:6\nper_user_max:7\nauth_ok: 1\nend\n")
        account = pureftpd.extauth_account(b"j", full)
        self.assertEqual(account, pureftpd.Account(b"j", 42, 21, b"/x", account.groups, b"", 1, 2, 5, 6, 4, 3, 7,
                                                   backend="extauth", tilde=True))

    def test_not_found(self):
        for answer in (b"", b"auth_ok:0\nend\n", b"end\n", b"uid:7\nend\n"):
            self.assertIsNone(pureftpd.extauth_account(b"j", answer), answer)

    def test_refused(self):
        for answer in (b"auth_ok:-1\nend\n", b"auth_ok:2\nend\n", b"auth_ok:yes\nend\n", b"auth_ok:\nend\n",
                       self.GOOD[:-1], self.GOOD[:-4], b"auth_ok:0\n", b"x",
                       self.GOOD.replace(b"uid:42", b"uid:0"), self.GOOD.replace(b"gid:21", b"gid:0"),
                       self.GOOD.replace(b"uid:42\n", b""), self.GOOD.replace(b"uid:42", b"uid:-1"),
                       self.GOOD.replace(b"uid:42", b"uid:42x"), self.GOOD.replace(b"uid:42", b"uid:4294967295"),
                       self.GOOD.replace(b"uid:42", b"uid:" + b"9" * 4000), self.GOOD.replace(b"dir:/", b"dir:"),
                       self.GOOD.replace(b"end", b"user_quota_size:lots\nend")):
            with self.subTest(answer[:60]), self.assertRaises(Refused):
                pureftpd.extauth_account(b"j", answer)


class ExtauthBackend(BackendTest):
    def serve(self, answer, delay_end=None):
        """A socket that takes one request and gives `answer`; the list that the request will be in."""
        listener = socket.socket(socket.AF_UNIX)
        listener.bind(self.path("sock"))
        listener.listen(1)
        seen = []

        def run():
            connection, _ = listener.accept()
            with connection:
                seen.append(connection.recv(65536))
                connection.sendall(answer)
                if delay_end:
                    delay_end.wait(20)
        thread = threading.Thread(target=run)
        thread.start()
        self.addCleanup(thread.join)
        self.addCleanup(listener.close)
        return seen

    def test_the_question(self):
        seen = self.serve(ExtauthAnswers.GOOD)
        account = self.login(("extauth", self.path("sock")), password=b"pass: word")
        self.assertEqual(account.uid, 42)
        self.assertEqual(seen, [b"account:joe\npassword:pass: word\nlocalhost:10.0.0.1\nlocalport:21\npeer:192.0.2.1\n"
                                b"sni_name:ftp.example\nencrypted:1\nend\n"])

    def test_nothing_that_breaks_a_line_is_sent(self):
        with self.assertRaises(Refused):
            pureftpd.extauth_question(b"joe", b"x", PEER._replace(sni="a\nuid:0"))

    def test_not_found_and_empty_go_on(self):
        path = self.puredb(f"joe:{JOEHASH}:1001:1002::/home/joe")
        self.serve(b"")
        self.assertEqual(self.login(("extauth", self.path("sock")), ("puredb", path)).backend, "puredb")
        self.assertEqual([level for level, _ in self.log], ["warning"])

    def test_nobody_there_is_tried_again_and_then_lets_nobody_in(self):
        with self.assertRaisesRegex(BackendBroken, "sock"):
            pureftpd.extauth_ask(self.path("sock"), b"end\n", self.log, pause=0.0)
        self.assertEqual([level for level, _ in self.log], ["warning"] * (pureftpd.EXTAUTH_TRIES - 1))

    def test_somebody_who_does_not_answer_is_not_waited_for_for_ever(self):
        done = threading.Event()
        self.serve(b"auth_ok:1\n", done)
        try:
            with self.assertRaises(BackendBroken):
                pureftpd.extauth_ask(self.path("sock"), b"end\n", self.log, seconds=0.1)
        finally:
            done.set()

    def test_an_endless_answer_is_cut(self):
        self.serve(b"x" * 5000)
        answer = pureftpd.extauth_ask(self.path("sock"), b"end\n", self.log)
        self.assertEqual(len(answer), 4095)

    @unittest.skipUnless(os.geteuid() == 0, "needs root")
    @unittest.skipUnless(shutil.which("pure-authd", path=ORIGINALS), "the original's pure-authd is not installed")
    def test_the_originals_authd_answers(self):
        with open(self.path("program"), "w") as file:
            file.write('#!/bin/sh\nset "$AUTHD_ACCOUNT:$AUTHD_PASSWORD:$AUTHD_LOCAL_IP:$AUTHD_LOCAL_PORT"\n'
                       'test "$1:$AUTHD_REMOTE_IP:$AUTHD_ENCRYPTED:$AUTHD_CLIENT_SNI_NAME" ='
                       ' "joe:secret:10.0.0.1:21:192.0.2.1:1:ftp.example" &&\n'
                       'echo auth_ok:1 || echo auth_ok:-1\necho uid:42\necho gid:21\necho dir:/home/j\necho end\n')
        os.chmod(self.path("program"), 0o755)
        authd = subprocess.Popen([shutil.which("pure-authd", path=ORIGINALS), "-s", self.path("sock"), "-p",
                                  self.path("pid"), "-r", self.path("program")])
        self.addCleanup(authd.wait)
        self.addCleanup(authd.terminate)
        deadline = time.monotonic() + 10
        while not os.path.exists(self.path("sock")) and time.monotonic() < deadline:
            os.sched_yield()
        question = pureftpd.extauth_question(b"joe", b"secret", PEER)
        answer = pureftpd.extauth_ask(self.path("sock"), question, self.log, pause=0.01)
        self.assertEqual(pureftpd.extauth_account(b"joe", answer).home, b"/home/j")
        with self.assertRaises(Refused):
            self.login(("extauth", self.path("sock")), password=b"wrong")


class Anonymous(BackendTest):
    def test_a_virtual_host_has_its_directory(self):
        os.mkdir(self.path("10.0.0.1"))
        try:
            account = pureftpd.anonymous_account(login_options(), PEER, b"/srv", (self.directory,))
        except Refused:
            self.skipTest("no user ftp here")
        self.assertEqual((account.home, account.vhost), (os.fsencode(self.path("10.0.0.1")), "10.0.0.1"))
        self.assertEqual((account.name, account.anonymous), (b"ftp", True))
        other = PEER._replace(local_address="10.0.0.2")
        account = pureftpd.anonymous_account(login_options(), other, b"/srv", (self.directory,))
        self.assertEqual(account.vhost, "")

    def test_as_root_it_is_the_user_ftp(self):
        import pwd
        if os.geteuid():
            self.skipTest("needs root")
        try:
            entry = pwd.getpwnam("ftp")
        except KeyError:
            with self.assertRaisesRegex(Refused, "ftp"):
                pureftpd.anonymous_account(login_options(), PEER, b"/srv", (self.directory,))
            return
        account = pureftpd.anonymous_account(login_options(), PEER, b"/srv", (self.directory,))
        self.assertEqual((account.uid, account.gid, os.fsdecode(account.home)), entry[2:4] + entry[5:6])

    def test_as_an_ordinary_user_it_is_ourselves(self):
        """In a process of its own, because it gives up root."""
        os.chmod(self.directory, 0o755)
        os.mkdir(self.path("10.0.0.1"))
        script = ("import os, sys, pureftpd\nif not os.getuid(): os.setgid(12345), os.setuid(12345)\n"
                  "for address, root in (('127.0.0.1', b'/srv'), ('127.0.0.1', b''), ('::ffff:10.0.0.1', b'/srv')):\n"
                  " peer = pureftpd.Peer('127.0.0.1', 1, address, 21)\n"
                  " a = pureftpd.anonymous_account(None, peer, root, sys.argv[1:])\n"
                  " assert (a.uid, a.gid, a.groups) == (os.getuid(), os.getgid(), None)\n"
                  " print(os.fsdecode(a.home), a.vhost)\n")
        environment = {"PYTHONPATH": os.path.dirname(pureftpd.__file__), "PYTHONDONTWRITEBYTECODE": "1"}
        for more, expected in (({}, "/srv \n/ \n"), ({"FTP_ANON_DIR": "/x"}, "/x \n/x \n")):
            done = subprocess.run([sys.executable, "-c", script, self.path("none"), self.directory], cwd="/",
                                  stdout=subprocess.PIPE, env={**environment, **more}, check=True)
            self.assertEqual(done.stdout.decode(), expected + self.path("10.0.0.1") + " 10.0.0.1\n")


# ==== Tests: tree =================================================================================


ESCAPE_ERRORS = (PermissionError, FileNotFoundError, NotADirectoryError, IsADirectoryError, FileExistsError)


class Trees(unittest.TestCase):
    """A directory `top` with a tree in it, and a directory `outside` that nobody may reach."""

    def setUp(self):
        self.place = os.path.realpath(tempfile.mkdtemp())
        self.addCleanup(shutil.rmtree, self.place)
        self.top, self.outside = os.path.join(self.place, "top"), os.path.join(self.place, "outside")
        os.mkdir(self.top)
        os.mkdir(self.outside)
        self.put("outside/secret", "secret")
        self.put("top/file", "mine")
        os.makedirs(os.path.join(self.top, "sub/below"))
        self.put("top/sub/below/deep", "deep")
        os.umask(os.umask(0o022))

    def put(self, name, text=""):
        path = os.path.join(self.place, name)
        with open(path, "w") as file:
            file.write(text)
        return path

    def link(self, target, name):
        os.symlink(target, os.path.join(self.top, name))

    def tree(self, own=None, host_path=None):
        top = os.open(self.top, os.O_RDONLY | os.O_DIRECTORY)
        tree = pureftpd.WalkedTree(top, own, os.fsencode(self.top if host_path is None else host_path))
        self.addCleanup(os.close, top)
        return tree

    def read(self, tree, path):
        fd = tree.open(path, os.O_RDONLY)
        with open(fd, "rb") as file:
            return file.read()

    @staticmethod
    def names(tree, path):
        fd = tree.open(path, os.O_RDONLY | os.O_DIRECTORY)
        try:
            return sorted(os.fsencode(name) for name in os.listdir(fd))
        finally:
            os.close(fd)

    def count_descriptors(self):
        return len(os.listdir("/proc/self/fd")) if os.path.exists("/proc/self/fd") else 0


class WalkedTreeConfinement(Trees):
    def escapes(self):
        """Paths of which none may lead out."""
        outside = os.fsencode(self.outside)
        self.link(self.outside, "absolute")
        self.link("../outside", "relative")
        self.link("../../../../../../../../.." + self.outside, "far")
        self.link("/", "root")
        self.link("..", "parent")
        self.link("absolute", "chain1")
        self.link("sub/../chain1", "chain2")
        self.link("/sub/../../outside", "clever")
        self.link("sub/below/up/up/up/up/outside", "zigzag")
        os.symlink("..", os.path.join(self.top, "sub/below/up"))
        os.symlink("../..", os.path.join(self.top, "sub/below/uptwo"))
        os.symlink(self.outside + "/secret", os.path.join(self.top, "secretlink"))
        os.symlink("/proc/self/cwd", os.path.join(self.top, "magic"))
        os.symlink("/proc/self/root" + self.outside, os.path.join(self.top, "magicroot"))
        yield from (b"absolute", b"relative", b"far", b"chain1", b"chain2", b"clever", b"zigzag", b"magicroot",
                      b"root" + outside,
                      b"parent/outside", b"parent/parent/outside", b"..", b"../outside", b"../../outside",
                      b"/../outside", b"/..",
                      b"sub/../../outside", b"sub/below/up/up/up/outside", b"sub/below/uptwo/../outside", outside,
                      b"/" + outside,
                      b"./.././outside", b"//../outside", b".." + b"/.." * 40 + outside, b"absolute/../outside",
                      b"magic" + outside)

    def test_nothing_is_read_outside(self):
        tree = self.tree()
        before = self.count_descriptors()
        for start in self.escapes():
            for operation in (lambda p: self.read(tree, p), tree.stat, lambda p: self.names(tree, p),
                              tree.change_directory,
                              lambda p: tree.chmod(p, 0o777), lambda p: tree.utime(p, 0.0),
                              lambda p: os.close(tree.descriptor(p))):
                for path in (start + b"/secret", start):
                    if path.endswith(b"..") and start != path + b"x":
                        continue                            # that is the root itself
                    with self.subTest(path), self.assertRaises(OSError):
                        operation(path)
        with self.assertRaises(OSError):
            self.read(tree, b"secretlink")
        self.assertEqual(self.count_descriptors(), before)
        self.assertEqual(stat.S_IMODE(os.stat(self.outside + "/secret").st_mode), 0o644)

    def test_nothing_is_changed_outside(self):
        tree = self.tree()
        for start in self.escapes():
            name = start + b"/new"
            if start.endswith(b".."):
                continue
            for operation in (lambda p: tree.open(p, os.O_WRONLY | os.O_CREAT), lambda p: tree.mkdir(p, 0o777),
                              tree.rmdir, tree.unlink,
                              lambda p: tree.rename(p, b"x"), lambda p: tree.rename(b"file", p), tree.lstat,
                              tree.readlink):
                for path in (name, start + b"/secret"):
                    with self.subTest(path), self.assertRaises(OSError):
                        operation(path)
        self.assertEqual(os.listdir(self.outside), ["secret"])
        with open(self.outside + "/secret") as file:
            self.assertEqual(file.read(), "secret")

    def test_dots_at_the_top_stay_there(self):
        tree = self.tree()
        for path in (b"..", b"/..", b"../..", b"sub/../..", b"sub/below/../../../..", b"/sub/../../"):
            with self.subTest(path):
                tree.change_directory(b"/sub")
                tree.change_directory(b"/" + path)
                self.assertEqual(tree.working_directory(), b"/")
                self.assertEqual(self.names(tree, path), [b"file", b"sub"])
        self.assertEqual(self.read(tree, b"../../file"), b"mine")

    def test_links_inside_work_as_under_chroot(self):
        self.link("sub/below", "relative")
        self.link("/sub/below", "absolute")
        self.link(os.path.join(self.top, "sub/below"), "host")
        self.link("host/../../file", "around")
        self.link("file", "filelink")
        self.link("filelink", "filelink2")
        os.symlink("../../file", os.path.join(self.top, "sub/below/up"))
        os.symlink("/../../file", os.path.join(self.top, "sub/below/toomuch"))
        tree = self.tree()
        for path, text in ((b"relative/deep", b"deep"), (b"absolute/deep", b"deep"), (b"host/deep", b"deep"),
                           (b"around", b"mine"),
                           (b"filelink", b"mine"), (b"filelink2", b"mine"), (b"relative/up", b"mine"),
                           (b"absolute/toomuch", b"mine"),
                           (b"/relative/../below/deep", b"deep")):
            with self.subTest(path):
                self.assertEqual(self.read(tree, path), text)
                self.assertEqual(tree.stat(path).st_size, 4)
        tree.change_directory(b"relative")
        self.assertEqual(tree.working_directory(), b"/sub/below")
        self.assertEqual(self.read(tree, b"../../file"), b"mine")

    def test_loops_end(self):
        self.link("loop", "loop")
        self.link("b", "a")
        self.link("a", "b")
        self.link("grow/grow", "grow")
        for number in range(60):
            self.link("chain%d" % (number + 1), "chain%d" % number)
        self.link("file", "chain60")
        tree = self.tree()
        before = self.count_descriptors()
        for path in (b"loop", b"loop/x", b"a", b"b/x", b"grow", b"grow/x", b"chain0"):
            for operation in (lambda p: self.read(tree, p), tree.stat, tree.change_directory):
                with self.subTest(path), self.assertRaises(OSError):
                    operation(path)
        self.assertEqual(self.read(tree, b"chain25"), b"mine")
        self.assertTrue(stat.S_ISLNK(tree.lstat(b"loop").st_mode))
        tree.unlink(b"loop")
        self.assertEqual(self.count_descriptors(), before)

    def test_final_links(self):
        self.link("file", "link")
        self.link("nowhere", "dangling")
        tree = self.tree()
        with self.assertRaises(OSError):
            tree.open(b"link", os.O_WRONLY | os.O_NOFOLLOW)
        with self.assertRaises(OSError):
            tree.open(b"dangling", os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW)
        self.assertFalse(os.path.lexists(os.path.join(self.top, "nowhere")))
        self.assertEqual(tree.readlink(b"link"), b"file")
        tree.rename(b"link", b"link2")
        tree.unlink(b"link2")
        self.assertEqual(self.read(tree, b"file"), b"mine")

    def test_nothing_waits(self):
        os.mkfifo(os.path.join(self.top, "fifo"))
        tree = self.tree()
        os.close(tree.open(b"fifo", os.O_RDONLY))
        with self.assertRaises(OSError):
            tree.open(b"fifo", os.O_WRONLY)
        with socket.socket(socket.AF_UNIX) as sock:
            sock.bind(os.path.join(self.top, "sock"))
            with self.assertRaises(OSError):
                tree.open(b"sock", os.O_RDONLY)

    def test_deep_paths_leave_no_descriptor(self):
        tree = self.tree()
        before = self.count_descriptors()
        path = b"sub/../" * 500 + b"sub/below/deep"
        self.assertEqual(self.read(tree, path), b"deep")
        with self.assertRaises(OSError):
            tree.stat(b"sub/" + b"x/" * 2000)
        with self.assertRaises(OSError):
            tree.stat(b"x" * 300)
        with self.assertRaises(ValueError):
            tree.stat(b"x\0y")                              # control bytes never come so far
        self.assertEqual(self.count_descriptors(), before)

    def swap(self, name, *targets):
        """A thread that puts each of `targets` in the place of `name`, for ever; a function that ends it."""
        end, rounds = threading.Event(), []
        path, spare = os.path.join(self.top, name), os.path.join(self.place, "spare")
        targets[0](path)

        def run():
            while not end.is_set():
                for make in targets:
                    make(spare)
                    if os.path.isdir(path) and not os.path.islink(path):
                        os.rmdir(path)
                    elif os.path.isdir(spare) and not os.path.islink(spare):
                        os.unlink(path)
                    os.rename(spare, path)
                rounds.append(1)

        thread = threading.Thread(target=run)
        thread.start()

        def stop():
            end.set()
            thread.join()
            self.assertGreater(len(rounds), 20)
        return stop

    def test_a_file_that_is_swapped_for_a_link(self):
        tree = self.tree()
        stop = self.swap("swapped", lambda p: os.symlink(self.outside + "/secret", p),
                         lambda p: os.link(self.top + "/file", p),
                         lambda p: os.symlink("../outside/secret", p))
        try:
            seen, done, refused, deadline = set(), 0, 0, time.monotonic() + EXAM_SECONDS
            while done + refused < 4000 or not (done and refused) and time.monotonic() < deadline:
                try:
                    seen.add(self.read(tree, b"swapped"))
                    fd = tree.open(b"swapped", os.O_WRONLY | os.O_CREAT | os.O_NOFOLLOW)
                    os.write(fd, b"mine")
                    os.close(fd)
                    tree.chmod(b"swapped", 0o600)
                    tree.utime(b"swapped", 1.0)
                    done += 1
                except OSError:
                    refused += 1
        finally:
            stop()
        self.assertEqual(seen, {b"mine"})
        self.assertTrue(done and refused, (done, refused))
        self.assert_untouched()

    def test_a_directory_that_is_swapped_for_a_link(self):
        tree = self.tree()
        stop = self.swap("swapped", lambda p: os.symlink(self.outside, p), os.mkdir,
                         lambda p: os.symlink("../outside", p))
        try:
            for _ in range(4000):
                for operation in (lambda: self.fail(self.read(tree, b"swapped/secret")),
                                  lambda: self.fail(tree.stat(b"swapped/secret")),
                                  lambda: self.assertEqual(self.names(tree, b"swapped"), []),
                                  lambda: tree.chmod(b"swapped/secret", 0o777), lambda: tree.unlink(b"swapped/secret"),
                                  lambda: tree.rename(b"swapped/secret", b"got")):
                    try:
                        operation()
                    except OSError:
                        pass
        finally:
            stop()
        self.assertFalse(os.path.exists(os.path.join(self.top, "got")))
        self.assert_untouched()

    def assert_untouched(self):
        self.assertEqual(os.listdir(self.outside), ["secret"])
        st = os.stat(os.path.join(self.outside, "secret"))
        self.assertEqual((stat.S_IMODE(st.st_mode), st.st_size), (0o644, 6))
        self.assertGreater(st.st_mtime, 2)


class OwnFilesProtection(Trees):
    """Without root the server's own files lie where its user may write; its clients must not."""

    def setUp(self):
        super().setUp()
        os.makedirs(os.path.join(self.top, "server/etc"))
        os.makedirs(os.path.join(self.top, "server/state"))
        self.own_files = [self.put("top/server/etc/users.pdb", "hash"), self.put("top/server/etc/key.pem", "key"),
                          os.path.join(self.top, "server/etc/log")]
        self.put("top/server/etc/other", "free")
        self.put("top/server/state/entry", "board")
        os.link(self.own_files[0], os.path.join(self.top, "hard"))
        self.link("server/etc/users.pdb", "soft")
        self.link("server/etc", "etc")
        own = pureftpd.OwnFiles([os.fsencode(path) for path in self.own_files],
                                [os.fsencode(self.top + "/server/state")])
        self.walked = self.tree(own)

    def refused(self, operation, *args):
        with self.subTest(args), self.assertRaises(OSError):
            operation(*args)

    def test_they_are_neither_read_nor_written(self):
        before = self.count_descriptors()
        for path in (b"server/etc/users.pdb", b"/server/../server/etc/./users.pdb", b"hard", b"soft", b"etc/users.pdb",
                     b"server/etc/key.pem",
                     b"server/state/entry", b"server/etc/../state/entry"):
            for flags in (os.O_RDONLY, os.O_WRONLY, os.O_WRONLY | os.O_CREAT, os.O_WRONLY | os.O_NOFOLLOW):
                self.refused(self.walked.open, path, flags)
            self.refused(self.walked.chmod, path, 0o777)
        self.assertEqual(self.count_descriptors(), before)
        with open(self.own_files[0]) as file:
            self.assertEqual(file.read(), "hash")

    def test_they_stay_where_they_are(self):
        tree = self.walked
        for path in (b"server/etc/users.pdb", b"etc/key.pem", b"server/state", b"server/etc/log"):
            self.refused(tree.unlink, path)
            self.refused(tree.rmdir, path)
            self.refused(tree.rename, path, b"moved")
            self.refused(tree.rename, b"file", path)
        for path in (b"server", b"server/etc", b"server/state", b"server/../server"):
            self.refused(tree.rename, path, b"moved")
        self.refused(tree.rename, b"hard", b"moved")
        self.assertEqual(sorted(os.listdir(self.top)), ["etc", "file", "hard", "server", "soft", "sub"])

    def test_one_cannot_put_another_in_the_place_of_one_that_is_missing(self):
        for operation in (lambda p: self.walked.open(p, os.O_WRONLY | os.O_CREAT),
                          lambda p: self.walked.mkdir(p, 0o700)):
            self.refused(operation, b"server/etc/log")
            self.refused(operation, b"etc/log")
        self.assertFalse(os.path.lexists(self.own_files[2]))

    def test_a_file_that_the_server_replaces_stays_protected(self):
        self.put("top/server/etc/new", "new hash")
        os.rename(os.path.join(self.top, "server/etc/new"), self.own_files[0])
        self.refused(self.walked.open, b"server/etc/users.pdb", os.O_RDONLY)
        self.refused(self.walked.open, b"soft", os.O_RDONLY)

    def test_a_new_file_may_have_the_inode_of_one_that_was_replaced(self):
        os.link(self.own_files[0], os.path.join(self.top, "reused"))        # as a file system does by chance
        self.put("top/server/etc/new", "new hash")
        os.rename(os.path.join(self.top, "server/etc/new"), self.own_files[0])
        self.assertEqual(self.read(self.walked, b"reused"), b"hash")
        self.refused(self.walked.open, b"server/etc/users.pdb", os.O_RDONLY)

    def test_directories_that_were_made_anew(self):
        os.rename(os.path.join(self.top, "server"), os.path.join(self.top, "old"))
        os.makedirs(os.path.join(self.top, "server/etc"))
        self.put("top/server/etc/users.pdb", "new hash")
        self.refused(self.walked.open, b"server/etc/users.pdb", os.O_RDONLY)
        self.refused(self.walked.open, b"server/etc/log", os.O_WRONLY | os.O_CREAT)
        self.walked.rename(b"old/etc", b"free")                             # another one may have its inode by chance
        self.assertEqual(self.read(self.walked, b"free/users.pdb"), b"hash")
        self.assertEqual(self.names(self.walked, b"old/state"), [b"entry"])

    def test_closed_directories_are_not_entered_nor_listed(self):
        for path in (b"server/state", b"server/state/.", b"server/etc/../state"):
            self.refused(self.walked.change_directory, path)
            self.refused(lambda p: self.names(self.walked, p), path)
            self.refused(self.walked.open, path + b"/new", os.O_WRONLY | os.O_CREAT)
            self.refused(self.walked.mkdir, path + b"/new", 0o700)
            self.refused(self.walked.unlink, path + b"/entry")

    def test_all_else_is_free(self):
        self.assertEqual(self.read(self.walked, b"server/etc/other"), b"free")
        self.walked.rename(b"server/etc/other", b"server/etc/another")
        self.walked.rename(b"sub", b"sub2")
        self.walked.change_directory(b"server/etc")
        self.assertEqual(self.read(self.walked, b"../../file"), b"mine")

    def test_the_database_brings_its_passwd_file(self):
        if not hasattr(pureftpd, "own_files"):
            self.skipTest("starting is not part of this file")
        options = pureftpd.options_read(["-l", "puredb:" + self.top + "/server/etc/users.pdb", "-O",
                                         "clf:" + self.top + "/server/etc/log",
                                         "-g", self.top + "/server/etc/pid"])
        options.statedir = self.top + "/server/state"
        self.put("top/server/etc/users.passwd", "hash")
        tree = self.tree(pureftpd.own_files(options))
        for name in (b"users.pdb", b"users.passwd", b"log", b"pid", b"../state/entry"):
            self.refused(tree.open, b"server/etc/" + name, os.O_RDONLY)
            self.refused(tree.open, b"server/etc/" + name, os.O_WRONLY | os.O_CREAT)
        self.assertIn(os.path.basename(os.fsencode(pureftpd.__file__)), pureftpd.own_files(options).places)


class TreesAgree(Trees):
    """What the kernel's walk does, ours does too: the same results and the same errors."""

    def setUp(self):
        super().setUp()
        self.link("sub", "dirlink")
        self.link("file", "link")
        self.link("nowhere", "dangling")
        self.link("loop", "loop")
        here = os.getcwd()
        os.chdir(self.top)
        self.addCleanup(os.chdir, here)

    def outcome(self, function, *args):
        """What it returns, or the errno of what it raises."""
        try:
            result = function(*args)
        except OSError as error:
            return error.errno
        if isinstance(result, os.stat_result):
            return result.st_ino, result.st_mode, result.st_size
        return result

    PATHS = (b"file", b"sub", b"sub/", b"sub/below/deep", b"missing", b"missing/x", b"file/x", b"dirlink", b"dirlink/",
             b"dirlink/below", b"link",
             b"dangling", b"dangling/x", b"loop", b"loop/x", b".", b"./", b"sub/.", b"sub/..", b"sub/below/../..",
             b"dirlink/..", b"missing/..",
             b"file/..", b"x" * 256, b"caf\xe9", b"", b"file/", b"link/", b"file/.")

    def test_looking(self):
        walked, kernel = self.tree(), pureftpd.KernelTree()
        for name in ("stat", "lstat", "readlink"):
            for path in self.PATHS:
                if (name, path) == ("readlink", b"dirlink/"):
                    continue                                # ENOTDIR here, EINVAL there
                with self.subTest((name, path)):
                    self.assertEqual(self.outcome(getattr(walked, name), path),
                                     self.outcome(getattr(kernel, name), path))
        for path in self.PATHS:
            with self.subTest(("names", path)):
                self.assertEqual(self.outcome(lambda p: self.names(walked, p), path),
                                 self.outcome(lambda p: self.names(kernel, p), path))
            with self.subTest(("open", path)):
                self.assertEqual(self.outcome(lambda p: os.close(walked.open(p, os.O_RDONLY)), path),
                                 self.outcome(lambda p: os.close(kernel.open(p, os.O_RDONLY)), path))

    def test_changing(self):
        def play(make):
            shutil.rmtree(self.top)
            os.mkdir(self.top)
            os.chdir(self.top)
            os.makedirs("sub/below")
            for name in ("file", "other"):
                self.put("top/" + name, name)
            for target, name in (("sub", "dirlink"), ("file", "link"), ("nowhere", "dangling")):
                self.link(target, name)
            tree = make()
            out = []
            for name, *args in (
                    ("mkdir", b"new", 0o755), ("mkdir", b"new", 0o755), ("mkdir", b"new2/", 0o700),
                    ("mkdir", b"missing/x", 0o755),
                    ("mkdir", b"dirlink/in", 0o755), ("mkdir", b"link", 0o755), ("mkdir", b"dangling", 0o755),
                    ("mkdir", b"/", 0o755),
                    ("rmdir", b"new"), ("rmdir", b"new"), ("rmdir", b"file"), ("rmdir", b"dirlink"), ("rmdir", b"sub"),
                    ("rmdir", b"."),
                    ("rmdir", b"file/x"), ("rmdir", b"new2/"),
                    ("unlink", b"missing"), ("unlink", b"file/x"), ("unlink", b"other"), ("unlink", b"other"),
                    ("rename", b"file", b"sub/moved"), ("rename", b"missing", b"x"),
                    ("rename", b"sub/moved", b"missing/x"),
                    ("rename", b"sub", b"sub/below/x"), ("rename", b"sub/moved", b"sub"),
                    ("rename", b"dangling", b"dangling2"),
                    ("rename", b"sub/moved", b"file"), ("rename", b"file", b"file"), ("rename", b"sub", b"file"),
                    ("chmod", b"link", 0o600), ("chmod", b"dirlink", 0o700), ("chmod", b"dangling2", 0o600),
                    ("chmod", b"missing", 0o600),
                    ("utime", b"link", 1e9), ("utime", b"missing", 1e9), ("utime", b"sub", 1e9)):
                out.append((name, args, self.outcome(getattr(tree, name), *args)))
            for flags in (os.O_WRONLY, os.O_WRONLY | os.O_CREAT, os.O_WRONLY | os.O_CREAT | os.O_EXCL,
                          os.O_WRONLY | os.O_NOFOLLOW, os.O_RDONLY | os.O_DIRECTORY):
                for path in (b"file", b"link", b"sub", b"dangling2", b"fresh%d" % flags, b"missing/x", b"slash/"):
                    if path == b"dangling2" and flags & os.O_CREAT and not flags & os.O_EXCL:
                        continue
                    out.append((flags, path, self.outcome(lambda *a: os.close(tree.open(*a)), path, flags, 0o640)))
            seen = []
            for directory, _, names in os.walk("."):
                for name in [".", *names]:
                    st = os.lstat(os.path.join(directory, name))
                    seen.append((directory, name, oct(st.st_mode), int(st.st_mtime) == 10 ** 9))
            return out, sorted(seen)

        kernel = play(pureftpd.KernelTree)
        walked = play(self.tree)
        self.maxDiff = None
        self.assertEqual(walked[0], kernel[0])
        self.assertEqual(walked[1], kernel[1])

    def test_the_working_directory(self):
        walked, kernel = self.tree(), pureftpd.KernelTree()
        root = os.fsencode(self.top)
        for path in (b"sub", b"below", b"..", b"../dirlink", b"missing", b"../file", b"below/..", b".",
                     b"../sub/below", b"../.."):
            with self.subTest(path):
                self.assertEqual(self.outcome(walked.change_directory, path),
                                 self.outcome(kernel.change_directory, path))
                self.assertEqual(root + walked.working_directory().rstrip(b"/"), kernel.working_directory())
                self.assertEqual(walked.absolute(b"x/../y"), (walked.working_directory().rstrip(b"/") + b"/y"))

    def test_where_paths_lead(self):
        kernel = pureftpd.KernelTree()
        for path in (*self.PATHS, b"/", b"//", b"/.", b"dirlink/missing", b"dirlink/below/", b"dangling/missing/x", b"sub//below"):
            for form in (path, os.fsencode(self.top) + b"/" + path, b"./" + path):
                with self.subTest(form):
                    self.assertEqual(kernel.real(form), os.path.realpath(form))

    def test_names_are_bytes(self):
        walked, kernel = self.tree(), pureftpd.KernelTree()
        names = [b"caf\xc3\xa9", b"caf\xe9", bytes(range(1, 47)), bytes(range(48, 128)), bytes(range(128, 256)), b" ",
                 b"a\nb", b"\\", b"..."]
        for tree, other in ((walked, kernel), (kernel, walked)):
            for name in names:
                with self.subTest(name):
                    os.close(tree.open(name, os.O_WRONLY | os.O_CREAT, 0o644))
                    self.assertTrue(stat.S_ISREG(other.stat(name).st_mode))
                    self.assertIn(name, self.names(other, b"."))
                    other.rename(name, name + b"x")
                    other.unlink(name + b"x")
        walked.mkdir(b"\xff\xfe", 0o755)
        walked.change_directory(b"\xff\xfe")
        self.assertEqual(walked.working_directory(), b"/\xff\xfe")

    def test_a_root_that_lacks_permissions(self):
        if os.geteuid() == 0:
            self.skipTest("root may do everything")
        os.chmod(os.path.join(self.top, "sub"), 0o600)
        self.addCleanup(os.chmod, os.path.join(self.top, "sub"), 0o755)
        walked, kernel = self.tree(), pureftpd.KernelTree()
        for path in (b"sub", b"sub/below", b"sub/below/deep"):
            for name in ("stat", "change_directory", "unlink"):
                with self.subTest((name, path)):
                    self.assertEqual(self.outcome(getattr(walked, name), path),
                                     self.outcome(getattr(kernel, name), path))

    def test_disk(self):
        self.assertEqual(self.tree().disk().f_blocks, pureftpd.KernelTree().disk().f_blocks)


# ==== Tests: listing ==============================================================================


class PlainTree:
    """The session's tree as the listings need it: `base` is the root and the current directory."""

    def __init__(self, base):
        self.base = base

    def real(self, path):
        inside = os.path.normpath(b"/" + path)
        return self.base + b"/" + inside.lstrip(b"/") + (b"/" if path.endswith(b"/") else b"")

    def open(self, path, flags, mode=0o666):
        return os.open(self.real(path), flags, mode)

    def stat(self, path):
        return os.stat(self.real(path))

    def lstat(self, path):
        return os.lstat(self.real(path))

    def readlink(self, path):
        return os.readlink(self.real(path))


def listing_view(**changes):
    """A view like that of a chrooted virtual user who knows none but numbers."""
    return pureftpd.ListView(pureftpd.IdNames(), pureftpd.IdNames())._replace(**changes)


def listing_fill(base, now):
    """Below `base` every kind of entry that listings tell apart."""
    def make(name, size=0, mode=0o644, age=0):
        with open(os.path.join(base, name), "wb") as file:
            file.truncate(size)
        os.chmod(os.path.join(base, name), mode)
        os.utime(os.path.join(base, name), (now - age, now - age))

    for name in (b"sub", b"sub/deep", b"sub/deep/deeper", b"two words", b"empty", b"[set]", b"-dash"):
        os.mkdir(os.path.join(base, name))
    make(b"plain", 5)
    make(b"run", 10, 0o755, 86400)
    make(b"group-x", 11, 0o650, 100 * 86400)
    make(b"old", 12, 0o600, 200 * 86400)
    make(b"ancient", 13, 0o6777, 20000 * 86400)
    make(b"soon", 14, 0o4644, -100 * 86400)
    make(b"sticky", 15, 0o1666, 7)
    make(b"huge", 10 ** 10, 0o000)
    make(b"almost", 10 ** 10 - 1, 0o2745)
    make(b".hidden", 1)
    make(b"back\\slash", 2)
    make(b"caf\xc3\xa9", 3)
    make(b"caf\xe9", 4)
    make(b"empty/evil\nname", 6)
    make(b"empty/del\x7f", 6)
    make(b"two words/inside", 7)
    make(b"sub/a.txt", 8, 0o644, 11)
    make(b"sub/b.txt", 8, 0o644, 9)
    make(b"sub/deep/c.txt", 9)
    make(b"sub/deep/deeper/d.txt", 9)
    make(b"100%", 21)
    make(b"!first", 22)
    os.link(os.path.join(base, b"plain"), os.path.join(base, b"hard"))
    os.chmod(os.path.join(base, b"empty"), 0o1777)
    for name, target in ((b"to-dir", b"sub"), (b"to-file", b"run"), (b"dangling", b"no;where"), (b"to-link", b"to-dir"),
                         (b"to-fifo", b"pipe")):
        os.symlink(target, os.path.join(base, name))
    os.mkfifo(os.path.join(base, b"pipe"))
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(os.path.join(base, b"sock").decode())
    for folder in (b"sub", b"sub/deep", b"sub/deep/deeper", b"two words", b"empty", b"[set]", b"-dash", b""):
        os.utime(os.path.join(base, folder), (now - 60, now - 60))
    for name, target in ((b"to-dir", b"sub"), (b"to-file", b"run"), (b"to-link", b"sub"), (b"to-fifo", b"pipe")):
        mtime = os.stat(os.path.join(base, target)).st_mtime  # with -b the original's MLSD mixes the two up
        os.utime(os.path.join(base, name), (mtime, mtime), follow_symlinks=False)


class ListingValues(unittest.TestCase):
    """What needs no disk."""

    def test_options_of_list(self):
        for argument, letters, rest in (
            (b"", "l", b""), (b"-a", "al", b""), (b"-la dir", "al", b"dir"), (b" -1", "", b""), (b"-1l", "l", b""),
            (b"-lC", "C", b""), (b"-tS", "Sl", b""), (b"-St", "lt", b""), (b"-l -a  x y", "al", b"x y"),
            (b"-xyz x", "l", b"x"), (b"-", "l", b""), (b"--all x", "al", b"x"), (b"-a/tmp", "al", b"/tmp"),
            (b"-FRrd", "FRdlr", b""), (b"-C1", "", b""), (b"x -l", "l", b"x -l"),
        ):
            with self.subTest(argument=argument):
                self.assertEqual(pureftpd.list_options(argument), (set(letters), rest))

    def test_words_of_list(self):
        for rest, words in (
            (b"a", [b"a"]), (b"a b", [b"a", b"b"]), (b"a\\ b", [b"a b"]), (b"a ", [b"a"]), (b"a  ", [b"a", b""]),
            (b"a\\\\b", [b"a\\b"]), (b"\\*", [b"\\*"]), (b"\\{x\\}", [b"{x}"]), (b"a\\", [b"a\\"]),
        ):
            with self.subTest(rest=rest):
                self.assertEqual(pureftpd.list_words(rest), words)

    def test_globs(self):
        for pattern, matching, others in (
            (b"*", [b"a", b"a.b"], [b".a", b"."]),
            (b".*", [b".a", b"."], [b"a"]),
            (b"?", [b"a", b"\xff"], [b"", b"ab", b"."]),
            (b"[a-c]x", [b"ax", b"cx"], [b"dx", b"x", b"-x"]),
            (b"[!a-c]x", [b"dx"], [b"ax", b"x"]),
            (b"[]]", [b"]"], [b"["]),
            (b"[a", [b"[a"], [b"a"]),
            (b"[]", [b"[]"], [b"]"]),
            (b"[!]", [b"[!]"], [b"!"]),
            (b"[a-]", [b"a", b"-"], [b"b"]),
            (b"[a\\-c]", [b"a", b"-", b"c"], [b"b"]),
            (b"[\\]x]", [b"]", b"x"], [b"\\"]),
            (b"[.]x", [], [b".x"]),
            (b"\\*", [b"*"], [b"a"]),
            (b"a\\", [b"a\\"], [b"a"]),
            (b"*.t?t", [b"a.txt", b"a.txt.tat"], [b"a.txtx", b".txt"]),
            (b"a*b*c", [b"abc", b"aXbYbc"], [b"acb", b"ab"]),
            (b"{a,b}", [b"{a,b}"], [b"a"]),
            (b"**", [b"x"], [b".x"]),
        ):
            items = pureftpd.glob_compile(pattern)
            for name in matching:
                self.assertTrue(pureftpd.glob_match(items, name), (pattern, name))
            for name in others:
                self.assertFalse(pureftpd.glob_match(items, name), (pattern, name))

    def test_a_glob_that_would_backtrack_ends_at_once(self):
        items = pureftpd.glob_compile(b"*a" * 60 + b"b")
        self.assertFalse(pureftpd.glob_match(items, b"a" * 255))

    def test_columns(self):
        self.assertEqual(pureftpd.list_columns([]), [])
        self.assertEqual(pureftpd.list_columns([b"a", b"b"]), [b"a\tb"])
        self.assertEqual(pureftpd.list_columns([b"%d" % n for n in range(11)]),
                         [b"0\t2\t4\t6\t8\t10", b"1\t3\t5\t7\t9"])
        self.assertEqual(pureftpd.list_columns([b"x" * 80, b"y"]), [b"x" * 80, b"y"])

    def test_facts_are_selected_and_announced(self):
        self.assertEqual(pureftpd.facts_feature(),
                         "type*;size*;sizd*;modify*;UNIX.mode*;UNIX.uid*;UNIX.gid*;unique*;")
        chosen = pureftpd.facts_select(b"Modify;TYPE;nonsense;unix.MODE;")
        self.assertEqual(chosen, (b"type", b"modify", b"UNIX.mode"))
        self.assertEqual(pureftpd.facts_feature(chosen),
                         "type*;size;sizd;modify*;UNIX.mode*;UNIX.uid;UNIX.gid;unique;")
        self.assertEqual(pureftpd.facts_select(b""), ())

    def test_names_of_owners(self):
        names = pureftpd.IdNames({1: "joe", 2: "a-very-long-name"}, lookup={3: "late"}.__getitem__)
        self.assertEqual([names[n] for n in (1, 2, 3, 4, 2 ** 32 - 2)],
                         [b"joe       ", b"a-very-lon", b"late      ", b"4         ", b"4294967294"])
        users, groups = pureftpd.listing_names(0, [0], True, False)
        self.assertEqual((users[0], groups[99999]), (b"0         ", b"99999     "))
        self.assertEqual(pureftpd.listing_names(0, [0], True, True)[0][0], b"root      ")
        self.assertEqual(pureftpd.listing_names(5, [5], False, True)[0][0], b"root      ")

    def test_caches_stay_small(self):
        cache = pureftpd.Cache(str)
        for number in range(10000):
            self.assertEqual(cache[number], str(number))
        self.assertLessEqual(len(cache), 4096)

    def test_stamps(self):
        stamps = pureftpd.Stamps()
        self.assertEqual([stamps[t] for t in (0, 951827696, -1, 10 ** 30)],
                         [b"19700101000000", b"20000229123456", b"19691231235959", b"19700101014640"])


class Listings(unittest.TestCase):
    """Real directories."""

    NOW = 1700000000

    def setUp(self):
        self.base = tempfile.mkdtemp().encode()
        self.addCleanup(shutil.rmtree, self.base)
        self.tree = PlainTree(self.base)
        self.view = listing_view()
        descriptors = set(os.listdir("/proc/self/fd")) if os.path.isdir("/proc/self/fd") else None
        if descriptors:
            self.addCleanup(lambda: self.assertEqual(len(os.listdir("/proc/self/fd")), len(descriptors)))

    def make(self, name, size=0, mtime=NOW, mode=0o644):
        path = os.path.join(self.base, name)
        with open(path, "wb") as file:
            file.truncate(size)
        os.chmod(path, mode)
        os.utime(path, (mtime, mtime))

    def list(self, argument=b"", **changes):
        self.listing = pureftpd.list_blocks(self.tree, argument, self.view._replace(**changes), self.NOW)
        return b"".join(self.listing)

    def names(self, argument, **changes):
        return self.list(argument, **changes).split(b"\r\n")[:-1]

    def test_a_line(self):
        self.make(b"file", 1234)
        uid, gid = os.getuid(), os.getgid()
        self.assertEqual(self.list(), b"-rw-r--r--    1 %-10d %-10d       1234 Nov 14 22:13 file\r\n" % (uid, gid))
        self.assertEqual((self.listing.count, self.listing.options, self.listing.truncated), (1, "-l", False))

    def test_dates(self):
        half_year = 180 * 86400
        for mtime, offset, date in (
            (self.NOW, 0, b"Nov 14 22:13"), (self.NOW, 3600, b"Nov 14 23:13"), (self.NOW, 7200, b"Nov 15 00:13"),
            (self.NOW, -5400, b"Nov 14 20:43"), (self.NOW - half_year, 0, b"May 18 22:13"),
            (self.NOW - half_year - 1, 0, b"May 18  2023"), (self.NOW + half_year, 0, b"May 12 22:13"),
            (self.NOW + half_year + 1, 0, b"May 12  2024"), (0, 0, b"Jan  1  1970"), (0, -1, b"Dec 31  1969"),
        ):
            with self.subTest(mtime=mtime, offset=offset):
                self.make(b"file", 0, mtime)
                self.assertEqual(self.list(utc_offset=offset)[-20:], b" " + date + b" file\r\n"[:7])

    def test_sizes_of_eleven_digits(self):
        self.make(b"big", 10 ** 10)
        self.make(b"less", 10 ** 10 - 1)
        lines = self.list().split(b"\r\n")
        self.assertIn(b"        10000000000 Nov", lines[0])
        self.assertIn(b" 9999999999 Nov", lines[1])
        self.assertEqual(len(lines[0].split(b" Nov")[0]), len(lines[1].split(b" Nov")[0]) + 8)

    def test_sorting(self):
        for name, size, mtime in ((b"b", 1, 30), (b"a", 3, 20), (b"c", 2, 10), (b"B", 9, 40)):
            self.make(name, size, mtime)
        for options, order in (
            (b"-1", b"B a b c"), (b"-1r", b"c b a B"), (b"-1t", b"B b a c"), (b"-1rt", b"c a b B"),
            (b"-1S", b"B a c b"), (b"-1Sr", b"b c a B"), (b"-1tS", b"B a c b"), (b"-1St", b"B b a c"),
        ):
            self.assertEqual(self.names(options), order.split(), options)

    def test_dot_files_and_hidden_names(self):
        for name in (b".dot", b"plain", b"evil\nname", b"evil\x7f", b"\x01", b"\xff\xfe", b"caf\xc3\xa9", b"!"):
            self.make(name)
        self.assertEqual(self.names(b"-1"), [b"!", b"caf\xc3\xa9", b"plain", b"\xff\xfe"])
        everything = [b"!", b".", b"..", b".dot", b"caf\xc3\xa9", b"plain", b"\xff\xfe"]
        self.assertEqual(self.names(b"-1a"), everything)
        self.assertEqual(self.names(b"-1", show_dot_files=True), everything)
        self.assertEqual(set(b"".join(pureftpd.nlst_blocks(self.tree, b"", self.view)).split(b"\r\n")[:-1]),
                         set(everything))
        mlsd = b"".join(pureftpd.mlsd_blocks(self.tree, b"", self.view)).split(b"\r\n")[:-1]
        self.assertEqual({line.partition(b"; ")[2] for line in mlsd}, set(everything))

    def test_a_path_with_a_blank_is_found_as_it_stands(self):
        os.mkdir(os.path.join(self.base, b"some dir"))
        self.make(b"some dir/in")
        self.make(b"a*")
        self.make(b"ab")
        self.assertEqual(self.names(b"-1 some dir"), [b"in"])
        self.assertEqual(self.names(b"-1 some\\ dir"), [b"in"])
        self.assertEqual(self.names(b"-1 a*"), [b"a*"])
        os.mkdir(os.path.join(self.base, b"some"))
        self.assertEqual(self.names(b"-1 some ab"), [b"", b"", b"some:", b"", b"ab"])

    def test_links(self):
        self.make(b"file", 77, mode=0o755)
        for name, target in ((b"good", b"file"), (b"dir", b"."), (b"bad", b"x\r\ny")):
            os.symlink(target, os.path.join(self.base, name))
        tails = [line[62:] for line in self.names(b"-F")]
        self.assertEqual(tails, [b"bad -> x__y", b"dir -> ./", b"file*", b"good -> file*"])
        self.assertEqual(self.names(b"-1F"), [b"bad@", b"dir@", b"file*", b"good@"])
        lines = self.names(b"", broken_clients=True)
        self.assertEqual([line[:1] for line in lines], [b"l", b"d", b"-", b"-"])
        self.assertRegex(lines[3], rb"^-rwxr-xr-x .* 77 .* good$")
        self.assertEqual(self.names(b"-1 bad"), [])

    def test_recursion(self):
        os.makedirs(os.path.join(self.base, b"a/b/c"))
        os.mkdir(os.path.join(self.base, b"d"))
        self.make(b"a/b/f")
        flat = re.sub(rb"(?m)^[d-].{61}", b"", self.list(b"-R"))
        self.assertEqual(flat, b"a\r\nd\r\n" b"\r\n\r\n./a:\r\n\r\nb\r\n" b"\r\n\r\n./a/b:\r\n\r\nc\r\nf\r\n"
                         b"\r\n\r\n./a/b/c:\r\n\r\n" b"\r\n\r\n./d:\r\n\r\n")
        self.assertEqual(self.listing.count, 5)
        self.assertEqual(self.list(b"-R", max_depth=1).count(b":\r\n"), 2)
        self.assertEqual(self.list(b"-1R"), b"a\r\nd\r\n")  # as the original

    def test_recursion_deeper_than_pythons(self):
        path = self.base
        depth = 300
        here = os.getcwd()
        self.addCleanup(os.chdir, here)
        for _ in range(depth):
            path += b"/d"
            os.mkdir(path)
        self.assertEqual(self.list(b"-R", max_depth=10000).count(b"drwx"), depth)

    def test_limits(self):
        for number in range(30):
            self.make(b"%02d" % number, number, number)
        self.assertEqual(self.names(b"-1", max_files=3), [b"00", b"01", b"02"])
        self.assertTrue(self.listing.truncated)
        self.assertEqual(self.names(b"-1t", max_files=2), [b"29", b"28"])
        for blocks in (pureftpd.nlst_blocks, pureftpd.mlsd_blocks):
            for limit, lines in ((1, 1), (2, 2), (5, 5), (32, 32), (33, 32)):
                listing = blocks(self.tree, b"", self.view._replace(max_files=limit))
                self.assertEqual(b"".join(listing).count(b"\r\n"), lines)
                self.assertEqual((listing.count, listing.truncated), (lines, limit < 33))
        self.assertEqual(self.names(b"-1 *", max_files=29), [])
        self.assertEqual(len(self.listing.notes), 1)
        self.assertEqual(self.names(b"-1 2*", max_files=30), [b"2%d" % n for n in range(10)])

    def test_a_directory_larger_than_the_limit_is_not_held(self):
        for number in range(300):
            self.make(b"%03d" % (number * 7 % 300), number, number)
        batch, pureftpd.BATCH = pureftpd.BATCH, 10
        self.addCleanup(setattr, pureftpd, "BATCH", batch)
        self.assertEqual(self.names(b"-1", max_files=4), [b"000", b"001", b"002", b"003"])
        self.assertEqual(self.names(b"-1r", max_files=2), [b"299", b"298"])
        self.assertEqual(self.names(b"-1S", max_files=1), [b"%03d" % (299 * 7 % 300)])

    def test_glob_bombs(self):
        for number in range(50):
            os.mkdir(os.path.join(self.base, b"a" * 50 + b"%02d" % number))
        started = time.monotonic()
        for pattern in (b"*/../*/../*", b"*a*a*a*a*b", b"*" * 500, b"/*" * 1000, b"?/../" * 300, b"* " * 1000,
                        b"[a-z]" * 800, b"\\" * 4000, b"[" * 4000, b"[a\\]" * 1000,
                        b"[]" * 1999 + b"]", b"{a,b}" * 500):
            self.list(pattern, max_files=1000)
            self.assertLess(len(b"".join(self.listing.notes)), 2000)
        self.assertLess(time.monotonic() - started, 5)

    def test_what_vanishes_is_left_out(self):
        for name in (b"a", b"b", b"c"):
            self.make(name)
        listing = pureftpd.ListListing(self.tree, b"", self.view, self.NOW)
        self.assertEqual(len(listing.lines(b".", [b"a", b"gone", b"c"], self.tree.lstat, [])), 2)

    def test_what_cannot_be_read(self):
        self.assertEqual(self.list(b"nowhere"), b"")
        self.make(b"file")
        for argument in (b"nowhere", b"file"):
            with self.assertRaises(OSError):
                pureftpd.nlst_blocks(self.tree, argument, self.view)
        with self.assertRaises(FileNotFoundError):
            pureftpd.mlsd_blocks(self.tree, b"nowhere", self.view)
        with self.assertRaises(pureftpd.Refuse) as refused:
            pureftpd.mlsd_blocks(self.tree, b"file", self.view)
        self.assertEqual(refused.exception.args[0], 501)

    def test_an_unwanted_listing_leaves_no_descriptor(self):
        self.make(b"file")
        for blocks in (pureftpd.nlst_blocks, pureftpd.mlsd_blocks, pureftpd.list_blocks):
            blocks(self.tree, b"", self.view).close()
            listing = blocks(self.tree, b"", self.view)
            next(iter(listing))
            listing.close()

    def test_the_root_does_not_show_what_is_above(self):
        lines = b"".join(pureftpd.mlsd_blocks(self.tree, b"", self.view)).split(b"\r\n")
        self.assertEqual(lines[0].partition(b"unique=")[2], lines[1].partition(b"unique=")[2][:-1])
        here, above = self.names(b"-a")
        self.assertEqual(here, above[:-1])

    def test_what_the_final_reply_needs(self):
        self.make(b"a")
        self.make(b"b")
        self.list(b"-la nowhere/ a")
        self.assertEqual((self.listing.options, self.listing.count, self.listing.notes), ("-a -l", 1, []))
        self.list(b"-1")
        self.assertEqual((self.listing.options, self.listing.count), ("", 2))
        self.list(b"*a*b*c*d* " * 100)
        self.assertEqual(self.listing.notes, [b"Too much to look through for [*a*b*c*d*]"] * 10)

    def test_nlst(self):
        os.mkdir(os.path.join(self.base, b"d"))
        self.make(b"d/f")
        for argument, lines in ((b"d", b"d/. d/.. d/f"), (b"d/", b"d/. d/.. d/f"), (b"/d", b"/d/. /d/.. /d/f"),
                                (b"-la d", b"d/. d/.. d/f"), (b"-a", b". .. d")):
            self.assertEqual(b"".join(pureftpd.nlst_blocks(self.tree, argument, self.view)),
                             b"".join(line + b"\r\n" for line in lines.split()))

    def test_mlst(self):
        self.make(b"file", 5, 951827696, 0o640)
        os.mkdir(os.path.join(self.base, b"dir"))
        os.mkfifo(os.path.join(self.base, b"pipe"))
        for name, target in ((b"link", b"50%d"), (b"odd", b"a;b")):
            os.symlink(target, os.path.join(self.base, name))
        st = os.lstat(os.path.join(self.base, b"file"))
        self.assertEqual(
            pureftpd.mlst_line(self.tree, b"file", self.view),
            b"type=file;size=5;modify=20000229123456;UNIX.mode=0640;UNIX.uid=%d;UNIX.gid=%d;unique=%xg%x; file"
            % (st.st_uid, st.st_gid, st.st_dev & 0xFFFFFFFF, st.st_ino))
        for name, kind in ((b"dir", b"dir"), (b"", b"cdir"), (b".", b"cdir"), (b"..", b"pdir"), (b"/", b"pdir"),
                           (b"pipe", b"unknown"), (b"link", b"OS.unix=slink:"), (b"odd", b"OS.unix=symlink")):
            line = pureftpd.mlst_line(self.tree, name, self.view)
            self.assertTrue(line.startswith(b"type=" + kind + b";siz"), line)
            self.assertTrue(line.endswith(b"; " + (name or b".")), line)
        self.assertTrue(pureftpd.mlst_line(self.tree, b"link", self.view._replace(anonymous=True))
                        .startswith(b"type=OS.unix=slink:50%d;size=4;"))
        with self.assertRaises(FileNotFoundError):
            pureftpd.mlst_line(self.tree, b"nowhere", self.view)

    def test_mlsd_says_what_mlst_says(self):
        listing_fill(self.base, self.NOW)
        for changes in ({}, {"anonymous": True}, {"broken_clients": True}, {"facts": (b"size", b"unique")},
                        {"facts": (b"type", b"modify", b"UNIX.gid")}, {"facts": ()}):
            view = self.view._replace(**changes)
            lines = b"".join(pureftpd.mlsd_blocks(self.tree, b"", view)).split(b"\r\n")[:-1]
            self.assertGreater(len(lines), 25)
            for line in lines:
                facts, _, name = line.partition(b" ") if not view.facts else (lambda p: (p[0], p[1], p[2]))(
                    line.rpartition(b"; "))
                self.assertEqual(line, pureftpd.mlst_line(self.tree, name, view))
                self.assertEqual(b"UNIX.uid" in facts, not view.anonymous and b"UNIX.uid" in view.facts)

    def test_blocks_are_large(self):
        for number in range(1500):
            os.symlink(b"x", os.path.join(self.base, b"%-100d" % number))
        blocks = list(pureftpd.list_blocks(self.tree, b"", self.view, self.NOW))
        self.assertTrue(all(len(block) >= 65536 for block in blocks[:-1]))
        self.assertLess(len(blocks), 5)
        self.assertEqual(sum(block.count(b"\r\n") for block in blocks), 1500)


ORIGINAL = next((path for path in ("/opt/pureftpd-orig/usr/sbin/pure-ftpd", shutil.which("pure-ftpd") or "")
                 if os.access(path, os.X_OK)), "")


@unittest.skipUnless(os.geteuid() == 0, "needs root")
@unittest.skipUnless(ORIGINAL, "needs the original pure-ftpd")
class ListingsOfTheOriginal(unittest.TestCase):
    """The same directory, listed by pure-ftpd and by us: not one byte may differ."""

    LOGIN = b"joe:$1$ab$b2XAKzcGJvTR.javvk3280:2001:2001::%b::::::::::::\n"  # password: pw
    ARGUMENTS = (
        b"", b"-a", b"-l", b"-1", b"-C", b"-F", b"-1F", b"-CF", b"-aF", b"-r", b"-1r", b"-d", b"-dF", b"-R", b"-aR",
        b"-FR", b"-1FR", b"-1R", b"-CR", b"-CRF", b"-Rr", b"-z", b"-", b"-d *", b"-1d *", b"-lt sub", b"-ltr sub",
        b"-S two\\ words", b"sub", b"sub/", b"/sub", b"//sub//deep", b"/./sub/./deep", b"-R sub", b"-R sub/",
        b"-R sub empty", b"-a sub", b"-C sub plain", b"plain", b"plain run", b"plain  run", b"sub plain empty run",
        b"sub ", b"sub  ", b"nowhere", b"nowhere sub", b"sub nowhere", b"two\\ words", b"two words", b"dangling",
        b"to-dir", b"to-dir/", b"to-file", b"to-link", b"pipe", b"sock", b"-F to-file", b"-F to-dir", b"-dF to-dir",
        b"*", b"-1 *", b".*", b"-1d .*", b"*.txt", b"sub/*", b"sub/*.txt", b"s*/*", b"*/", b"s*/*/*", b"-1 s*/d*/*",
        b"?un", b"[ps]*", b"-1d [!a-z]*", b"-d [a-m]*", b"-d *[", b"-d []a-c]*", b"[", b"a* p*", b"****", b"*a*a*a*a*",
        b"-d t*o*", b"-d \\*", b"-d p\\lain", b"{plain,run}", b"-d caf*", b"-d 100%", b"-d caf?", b"caf\xe9",
        b"\\[set]", b"..", b".", b"-d ..", b"-R empty", b"~", b"-d */deep",
    )

    def setUp(self):
        self.base = tempfile.mkdtemp().encode()
        self.addCleanup(shutil.rmtree, self.base)
        self.home = os.path.join(self.base, b"home")
        os.mkdir(self.home)
        self.now = int(time.time())
        listing_fill(self.home, self.now)
        for folder, folders, files in [*os.walk(self.base)]:
            for name in [b".", *folders, *files]:
                path = os.path.join(folder, name)
                mode = os.lstat(path).st_mode
                os.chown(path, 2001, 2001, follow_symlinks=False)
                if not stat.S_ISLNK(mode):
                    os.chmod(path, stat.S_IMODE(mode))
        passwords = os.path.join(self.base, b"passwd")
        with open(passwords, "wb") as file:
            file.write(self.LOGIN % self.home)
        subprocess.run([os.path.join(os.path.dirname(ORIGINAL), "../bin/pure-pw"), "mkdb",
                        os.path.join(self.base, b"pdb"), "-f", passwords], check=True)

    def log_in(self, *options):
        """Start the original as a super-server does, and log in."""
        with socket.create_server(("127.0.0.1", 0)) as listener:
            self.control = socket.create_connection(listener.getsockname())
            self.addCleanup(self.control.close)
            end, _ = listener.accept()
        with end:
            server = subprocess.Popen([ORIGINAL, "-A", "-H", "-f", "none", "-l", "puredb:%s/pdb" % self.base.decode(),
                                       *options], stdin=end, stdout=end, env={"TZ": "XYZ-05:30"})
        self.addCleanup(server.wait)
        self.addCleanup(self.control.close)
        self.control.settimeout(20)
        self.replies = self.control.makefile("rb")
        self.addCleanup(self.replies.close)
        self.reply()
        self.command(b"USER joe")
        self.assertTrue(self.command(b"PASS pw").startswith(b"230"))

    def reply(self):
        lines = [self.replies.readline()]
        while lines[-1] and not re.match(rb"\d\d\d ", lines[-1]):
            lines.append(self.replies.readline())
        return b"".join(lines)

    def command(self, line):
        self.control.sendall(line + b"\r\n")
        return self.reply()

    def fetch(self, command):
        """(data, final reply) of a listing command, or ("", refusal)."""
        high, low = re.findall(rb",(\d+),(\d+)\)", self.command(b"PASV"))[0]
        with socket.create_connection(("127.0.0.1", int(high) * 256 + int(low)), 20) as data:
            reply = self.command(command)
            if not reply.startswith(b"150"):
                return b"", reply
            with data.makefile("rb") as file:
                return file.read(), self.reply()

    def compare(self, verb, argument, ours):
        data, reply = self.fetch(verb + b" " + argument if argument else verb)
        with self.subTest(verb=verb, argument=argument):
            if isinstance(ours, Exception):
                self.assertEqual((data, reply[:3]), (b"", b"550"))
                return
            ours_read, theirs = b"".join(ours).split(b"\r\n"), data.split(b"\r\n")
            if verb == b"LIST":
                self.assertEqual(ours_read, theirs)
            elif ours.truncated:
                self.assertEqual(len(ours_read), len(theirs))
            else:  # the same order too, but for `.` and `..`, which Python does not tell us about
                self.assertEqual(*([line for line in lines if not re.search(rb"(^|[/ ])[.][.]?$", line)]
                                   for lines in (ours_read, theirs)))
                self.assertEqual(set(ours_read), set(theirs))
            final = (b"226-Options: " + ours.options.encode() + b" \r\n") if ours.options else b""
            self.assertIn(final.replace(b" \r\n", b""), reply)
            self.assertIn(b"%d matches" % ours.count, reply)
            self.assertEqual(b"truncated" in reply, ours.truncated)

    def compare_all(self, options=(), arguments=ARGUMENTS, **changes):
        self.log_in(*options)
        tree = PlainTree(self.home)
        view = listing_view(utc_offset=19800)._replace(**changes)
        for argument in arguments:
            if argument != b"two words":  # a known difference, see ListListing.targets
                self.compare(b"LIST", argument, pureftpd.list_blocks(tree, argument, view, self.now))
        for argument in (b"", b"sub", b"sub/", b"/sub", b".", b"..", b"to-dir", b"[set]", b"-dash", b"two words", b"*",
                         b"plain", b"nowhere"):
            for verb, blocks in ((b"NLST", pureftpd.nlst_blocks), (b"MLSD", pureftpd.mlsd_blocks)):
                try:
                    ours = blocks(tree, argument, view)
                except (OSError, pureftpd.Refuse) as error:
                    ours = error
                self.compare(verb, argument, ours)
        for name in (b"", b".", b"..", b"/", b"sub", b"sub/", b"/sub/a.txt", b"to-dir", b"dangling", b"pipe", b"huge",
                     b"two words", b"caf\xe9"):
            with self.subTest(mlst=name):
                self.assertEqual(self.command(b"MLST " + name if name else b"MLST").split(b"\r\n")[1],
                                 b" " + pureftpd.mlst_line(tree, name, view))

    def test_all_options_and_globs(self):
        self.compare_all()

    def test_dot_files_and_broken_clients(self):
        self.compare_all(("-D", "-b"), show_dot_files=True, broken_clients=True)

    def test_limits(self):
        self.compare_all(("-L", "7:3"), max_files=7, max_depth=3, arguments=(
            b"", b"-a", b"-1", b"-C", b"-r", b"*", b"sub plain run", b"plain run old soon huge 100%", b"sub/*"))
        self.control.close()
        self.log_in("-L", "100:1")
        view = listing_view(utc_offset=19800, max_files=100, max_depth=1)
        for argument in (b"-R", b"-R sub", b"*", b"?un", b"plain"):
            self.compare(b"LIST", argument, pureftpd.list_blocks(PlainTree(self.home), argument, view, self.now))


# ==== Tests: quota ================================================================================


class CollectedLog:
    """A log that keeps its lines."""

    def __init__(self):
        self.lines = []

    def __getattr__(self, level):
        return lambda text: self.lines.append((level, text))


class QuotaSession:
    """What a session does with files and a quota, without the network: the order of steps that the theory asks for."""

    def __init__(self, home, files=None, size=None):
        self.log = CollectedLog()
        self.tree = pureftpd.WalkedTree(os.open(home, os.O_RDONLY))
        self.quota = pureftpd.Quota(self.tree, files, size, self.log)

    def close(self):
        os.close(self.tree.root)

    def remove(self, account, path):
        counted = account.counted(path)
        self.tree.unlink(path)
        account.charge(-1, -counted)

    def opened(self, account, path, append, offset, fresh):
        """(fd, meter, bytes before) of an upload into `path`; with `fresh` only into a new file."""
        fd, before = -1, 0
        try:
            with contextlib.suppress(FileNotFoundError):
                fd = self.tree.open(path, os.O_WRONLY | os.O_NOFOLLOW)
                before = os.fstat(fd).st_size
            if fd != -1 and not account.hold(fd):
                if append or offset:
                    raise pureftpd.Refuse(450, "another session is writing this file")
                os.close(fd)
                self.remove(account, path)
                fd, before = -1, 0
            offset = before if append else offset
            account.claim(1 if fd == -1 else 0, before - offset)
            if fd == -1:
                fd = self.tree.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW)
                account.hold(fd)
            os.ftruncate(fd, offset)
            os.lseek(fd, offset, os.SEEK_SET)
            return fd, account.meter(fd, before, offset), before
        except BaseException:
            if fd != -1:
                os.close(fd)
            raise

    @contextlib.contextmanager
    def uploading(self, path, append=False, offset=0, atomic=False):
        """Yields write(data), which raises Refuse(552) when the quota is reached; any exception ends the upload."""
        target, full = path, False
        if atomic:
            path = b"/.pureftpd-upload.%x" % random.getrandbits(64)
        with self.quota.lock() as account:
            fd, meter, before = self.opened(account, path, append, offset, atomic)

        def write(data):
            nonlocal full
            room = meter.room(len(data))
            os.write(fd, data[:room])
            if room < len(data):
                full = True
                raise pureftpd.Refuse(552, "full")
        done = False
        try:
            yield write
            done = True
        finally:
            with self.quota.lock() as account:
                if full and append:
                    os.ftruncate(fd, before)
                meter.settle(account)
                if atomic and not done or full and not append:
                    with contextlib.suppress(FileNotFoundError):
                        self.remove(account, path)
                elif atomic:
                    self.rename_in(account, path, target)
            os.close(fd)

    def store(self, path, data, step=4096, **how):
        with self.uploading(path, **how) as write:
            for i in range(0, len(data), step):
                write(data[i:i + step])

    def delete(self, path):
        with self.quota.lock() as account:
            self.remove(account, path)
        return self.quota.lines(account)

    def rename_in(self, account, source, target):
        there = self.tree.lstat(source)
        counted = None
        with contextlib.suppress(FileNotFoundError):
            old = self.tree.lstat(target)
            if (old.st_dev, old.st_ino) == (there.st_dev, there.st_ino):
                return
            counted = account.counted(target)
        self.tree.rename(source, target)
        if counted is not None:
            account.charge(-1, -counted)

    def rename(self, source, target):
        with self.quota.lock() as account:
            self.rename_in(account, source, target)

    def mkdir(self, path):
        with self.quota.lock() as account:
            account.claim(1)
            try:
                self.tree.mkdir(path, 0o755)
            except OSError:
                account.charge(-1, 0)
                raise

    def rmdir(self, path):
        with self.quota.lock() as account:
            self.tree.rmdir(path)
            account.charge(-1, 0)


def recount(home):
    """(files and directories, bytes) below `home` but for the quota file."""
    files = size = 0
    for top, directories, names in os.walk(os.fsencode(home)):
        files += len(directories)
        for name in names:
            if name != b".ftpquota":
                files += 1
                size += os.lstat(os.path.join(top, name)).st_size
    return files, size


class QuotaTests(unittest.TestCase):
    def setUp(self):
        self.home = tempfile.mkdtemp()
        self.addCleanup(shutil.rmtree, self.home)

    def session(self, files=None, size=None):
        session = QuotaSession(self.home, files, size)
        self.addCleanup(session.close)
        return session

    def path(self, name=".ftpquota"):
        return os.path.join(self.home, name)

    def make(self, name, size):
        with open(self.path(name), "wb") as file:
            file.truncate(size)

    def held(self):
        with open(self.path()) as file:
            return file.read()

    def put(self, text):
        with open(self.path(), "w") as file:
            file.write(text)

    def refused(self, code, function, *args, **kwargs):
        with self.assertRaises(pureftpd.Refuse) as raised:
            function(*args, **kwargs)
        self.assertEqual(raised.exception.args[0], code)


class QuotaFile(QuotaTests):
    """The file itself: format, creation, tearing."""

    def test_parse(self):
        for data, values in ((b"", (0, 0)), (b"0 0\n", (0, 0)), (b"12 345\n", (12, 345)), (b"12 345", (12, 345)),
                             (b"9 5\n1000000\n", (9, 5)), (b" 7  8 \r\n", (7, 8))):
            with self.subTest(data):
                self.assertEqual(pureftpd.quota_parse(data), values)
        for data in (b"\n", b"5", b"5 \n", b"x 5\n", b"5 -1\n", b"5 1 1\n", b"1.0 2\n", b"\0\0\0\0", b"1 " + b"9" * 30):
            with self.subTest(data), self.assertRaises(ValueError):
                pureftpd.quota_parse(data)

    def test_first_look_makes_an_empty_private_file(self):
        self.assertEqual(self.session(5, 1048576).quota.lines(),
                         ["0 files used (0%) - authorized: 5 files", "0 Kbytes used (0%) - authorized: 1024 Kb"])
        st = os.stat(self.path())
        self.assertEqual((stat.S_IMODE(st.st_mode), st.st_size), (0o600, 0))

    def test_without_limits_nothing_is_touched(self):
        session = self.session()
        session.store(b"/a", b"x" * 100)
        session.mkdir(b"/d")
        self.assertEqual(session.delete(b"/a"), [])
        self.assertFalse(os.path.exists(self.path()))

    def test_every_state_of_a_rewrite_means_the_old_or_the_new_value(self):
        """All prefixes of the one write, then the cut: what a crash between any two system calls leaves."""
        states, real = [], (os.pwrite, os.ftruncate)

        def spy(call):
            def wrapped(fd, *args):
                result = call(fd, *args)
                states.append(os.pread(fd, 100, 0))
                return result
            return wrapped
        self.put("12 1000000\n")
        os.pwrite, os.ftruncate = map(spy, real)
        try:
            with self.session(20, 1 << 30).quota.lock() as account:
                account.charge(-3, -999995)
        finally:
            os.pwrite, os.ftruncate = real
        self.assertEqual([pureftpd.quota_parse(s) for s in states], [(9, 5), (9, 5)])
        self.assertEqual(self.held(), "9 5\n")

    def test_readers_without_lock_never_see_zero(self):
        session = self.session(1000, 1 << 40)
        self.put("7 999999\n")
        child = os.fork()
        if child == 0:
            try:
                fd = os.open(self.path(), os.O_RDONLY)
                while True:
                    value = pureftpd.quota_parse(os.pread(fd, 84, 0))
                    if value not in ((7, 999999), (8, 1000000)):
                        os._exit(1)
                    if os.path.exists(self.path("stop")):
                        os._exit(0)
            finally:
                os._exit(2)
        for _ in range(500):
            with session.quota.lock() as account:
                account.charge(1, 1)
                account.charge(-1, -1)
        self.make("stop", 0)
        self.assertEqual(os.waitpid(child, 0)[1], 0)

    def test_malformed_refuses_uploads_says_so_and_is_left_alone(self):
        self.put("what\n")
        session = self.session(5, 1 << 20)
        self.make("old", 0)
        self.refused(451, session.store, b"/a", b"x")
        self.refused(451, session.mkdir, b"/d")
        self.assertEqual(session.delete(b"/old"), [])
        self.assertEqual((os.listdir(self.home), self.held()), ([".ftpquota"], "what\n"))
        self.assertEqual(len(session.log.lines), 1)
        self.assertIn('"what"', session.log.lines[0][1])

    def test_a_link_a_fifo_or_a_directory_is_no_quota_file(self):
        with open(self.path("other"), "w") as file:
            file.write("0 0\n")
        for make in (lambda p: os.symlink("other", p), os.mkfifo, os.mkdir):
            make(self.path())
            self.refused(451, self.session(5, 5).store, b"/a", b"x")
            os.rmdir(self.path()) if os.path.isdir(self.path()) else os.unlink(self.path())
        self.assertEqual(os.stat(self.path("other")).st_size, 4)

    def test_locking_twice_is_a_bug_that_shows(self):
        quota = self.session(5, 5).quota
        with quota.lock(), self.assertRaises(RuntimeError):
            quota.lines()

    def test_forbidden_names(self):
        for path in (b".ftpquota", b"/.ftpquota", b"x.ftpquotax/y", b".FtpQuota", b".pureftpd-upload.1",
                     b"/d/.pureftpd-rename.1"):
            self.assertTrue(pureftpd.quota_forbids(path), path)
        for path in (b"ftpquota", b"/a/x.pureftpd-1", b".pureftpd", b""):
            self.assertFalse(pureftpd.quota_forbids(path), path)


class QuotaOperations(QuotaTests):
    """What each command leaves in the file; the values are the original's (see DifferentialQuota)."""

    def check(self, session, expected):
        self.assertEqual(self.held(), expected)
        self.assertEqual("%d %d\n" % recount(self.home), expected)

    def test_commands(self):
        s = self.session(5, 1 << 20)
        s.store(b"/a", b"x" * 5000)
        self.check(s, "1 5000\n")
        s.store(b"/a", b"x" * 300)
        self.check(s, "1 300\n")
        s.store(b"/a", b"x" * 700, append=True)
        self.check(s, "1 1000\n")
        s.store(b"/a", b"y" * 200, offset=600)
        self.check(s, "1 800\n")
        s.mkdir(b"/d")
        self.check(s, "2 800\n")
        s.store(b"/d/b", b"x" * 50, append=True)
        self.check(s, "3 850\n")
        s.rename(b"/d/b", b"/a")
        self.check(s, "2 50\n")
        s.rename(b"/a", b"/a")
        self.check(s, "2 50\n")
        s.store(b"/a", b"z" * 70000, atomic=True)
        self.check(s, "2 70000\n")
        s.store(b"/n", b"z" * 7, atomic=True)
        self.check(s, "3 70007\n")
        s.delete(b"/a")
        self.check(s, "2 7\n")
        s.rmdir(b"/d")
        self.check(s, "1 7\n")
        with self.assertRaises(FileNotFoundError):
            s.delete(b"/nothing")
        with self.assertRaises(OSError):
            s.mkdir(b"/n")
        self.check(s, "1 7\n")

    def test_renaming_over_directories_and_links(self):
        s = self.session(10, 1 << 20)
        s.mkdir(b"/d")
        s.mkdir(b"/e")
        s.rename(b"/d", b"/e")
        self.check(s, "1 0\n")

    def test_aborted_uploads_are_charged_with_what_stays(self):
        s = self.session(5, 1 << 30)
        for how, expected in (({}, "1 3000\n"), ({"append": True}, "1 6000\n"), ({"atomic": True}, "1 6000\n"),
                              ({"offset": 100}, "1 3100\n")):
            with self.subTest(how), self.assertRaises(ConnectionError), s.uploading(b"/a", **how) as write:
                write(b"x" * 3000)
                raise ConnectionError
            self.check(s, expected)

    def test_limits(self):
        s = self.session(3, 10000)
        self.refused(552, s.store, b"/big", b"x" * 10001)
        self.assertFalse(os.path.exists(self.path("big")))
        self.check(s, "0 0\n")
        s.store(b"/a", b"x" * 10000, step=10000)
        s.store(b"/empty", b"")
        self.check(s, "2 10000\n")
        self.refused(552, s.store, b"/b", b"x")
        self.check(s, "2 10000\n")
        self.refused(552, s.store, b"/a", b"y", append=True)
        self.check(s, "2 10000\n")
        s.store(b"/a", b"y" * 10000)
        self.check(s, "2 10000\n")
        self.refused(552, s.store, b"/a", b"y" * 10001)         # its old content went when the upload began
        self.check(s, "1 0\n")
        s.mkdir(b"/d")
        s.mkdir(b"/e")
        self.refused(552, s.mkdir, b"/f")
        self.refused(552, s.store, b"/f", b"")
        self.refused(552, s.store, b"/empty", b"1")
        self.check(s, "3 0\n")

    def test_over_the_limit_from_the_start(self):
        self.put("1 20000\n")
        self.make("a", 20000)
        s = self.session(None, 10000)
        self.refused(552, s.store, b"/b", b"")
        self.refused(552, s.store, b"/a", b"", append=True)
        s.store(b"/a", b"x" * 9000)                             # what it frees is enough
        self.check(s, "1 9000\n")

    def test_files_alone_and_size_alone(self):
        s = self.session(1, None)
        s.store(b"/a", b"x" * 100000)
        self.assertEqual(s.quota.lines(), ["1 files used (100%) - authorized: 1 files"])
        os.unlink(self.path())
        s = self.session(None, 200000)
        s.store(b"/a", b"x" * 100000)
        self.assertEqual(s.quota.lines(), ["97 Kbytes used (50%) - authorized: 195 Kb"])

    def test_allo(self):
        quota = self.session(2, 100).quota
        for held, size, answer in (("0 0", 100, True), ("0 0", 101, False), ("1 50", 50, True), ("2 0", 1, False),
                                   ("0 100", 0, False), ("bad", 1, False)):
            self.put(held)
            with quota.lock() as account:
                self.assertEqual(account.allows(size), answer, held)

    def test_never_below_zero(self):
        self.make("uncounted", 50)
        s = self.session(5, 1000)
        s.delete(b"/uncounted")
        with s.quota.lock() as account:
            self.assertEqual((account.files, account.size), (0, 0))

    def test_storing_over_what_was_never_counted_counts_it(self):
        self.make("uncounted", 50)
        s = self.session(5, 1000)
        s.store(b"/uncounted", b"x" * 80)
        self.assertEqual(self.held(), "0 80\n")

    def test_big_truncation_is_given_back_at_once(self):
        big = 3 * pureftpd.QUOTA_STEP
        self.make("a", big)
        self.put("1 %d\n" % big)
        s = self.session(None, big)
        with s.uploading(b"/a") as write:
            self.assertEqual(self.held(), "1 %d\n" % pureftpd.QUOTA_STEP)
            write(b"x" * 10)
        self.check(s, "1 10\n")

    def test_a_killed_session_leaves_too_much_never_too_little(self):
        s = self.session(5, 1 << 30)
        child = os.fork()
        if child == 0:
            with s.uploading(b"/a") as write:
                write(b"x" * 100000)
                os._exit(0)
        os.waitpid(child, 0)
        with s.quota.lock() as account:
            self.assertEqual(account.files, 1)
            self.assertGreaterEqual(account.size, 100000)
            self.assertLessEqual(account.size, 100000 + pureftpd.QUOTA_STEP)

    def test_room_is_reserved_in_steps(self):
        s, looks = self.session(5, 1 << 40), []
        lock = s.quota.lock
        s.quota.lock = lambda: looks.append(1) or lock()
        with s.uploading(b"/a") as write:
            for _ in range(32):
                write(b"x" * (1 << 20))
        self.assertLessEqual(len(looks), 5)


class QuotaSessions(QuotaTests):
    """Several sessions of one account."""

    def test_deleting_a_file_that_another_session_writes(self):
        a, b = self.session(9, 1 << 20), self.session(9, 1 << 20)
        with a.uploading(b"/f") as write:
            write(b"x" * 1000)
            b.delete(b"/f")
            write(b"x" * 1000)
        self.assertEqual(self.held(), "0 0\n")

    def test_storing_over_a_file_that_another_session_writes(self):
        a, b = self.session(9, 1 << 20), self.session(9, 1 << 20)
        with a.uploading(b"/f") as write:
            write(b"x" * 1000)
            b.store(b"/f", b"y" * 300)
            write(b"x" * 1000)
        self.assertEqual((self.held(), os.stat(self.path("f")).st_size), ("1 300\n", 300))

    def test_appending_to_a_file_that_another_session_writes(self):
        a, b = self.session(9, 1 << 20), self.session(9, 1 << 20)
        with a.uploading(b"/f") as write:
            write(b"x" * 1000)
            self.refused(450, b.store, b"/f", b"y", append=True)
        self.assertEqual(self.held(), "1 1000\n")

    def test_two_sessions_share_what_is_left(self):
        a, b = self.session(9, 100000), self.session(9, 100000)
        with a.uploading(b"/a") as write_a, b.uploading(b"/b") as write_b:
            for _ in range(50):
                write_a(b"x" * 1000)
                write_b(b"x" * 1000)
            self.assertRaises(pureftpd.Refuse, write_a, b"x")
        self.assertEqual(self.held(), "1 50000\n")

    def test_eight_sessions_at_once_never_pass_the_limit_and_the_sum_is_exact(self):
        limit, files, names = 400000, 12, [b"/%d" % i for i in range(10)]
        children = []
        for number in range(8):
            child = os.fork()
            if child == 0:
                try:
                    self.play(QuotaSession(self.home, files, limit), random.Random(number), names, limit, files)
                    os._exit(0)
                except BaseException:
                    import traceback
                    traceback.print_exc()
                finally:
                    os._exit(1)
            children.append(child)
        for child in children:
            self.assertEqual(os.waitpid(child, 0)[1], 0)
        self.assertEqual(self.held(), "%d %d\n" % recount(self.home))
        self.assertEqual([n for n in os.listdir(self.home) if n.startswith(".pureftpd")], [])

    def play(self, session, choice, names, limit, files):
        for _ in range(150):
            path, other = choice.choice(names), choice.choice(names)
            data = b"x" * choice.choice((0, 10, 5000, 60000, 200000))
            action = choice.choice("store store append offset atomic abort delete rename mkdir".split())
            try:
                if action in ("store", "append", "atomic"):
                    how = {action: True} if action != "store" else {}
                    session.store(path, data, **how)
                elif action == "offset":
                    with session.uploading(path, offset=min(5000, session.tree.lstat(path).st_size)) as write:
                        write(data)
                elif action == "abort":
                    with session.uploading(path, append=choice.random() < .5) as write:
                        write(data[:4096])
                        raise ConnectionError
                elif action == "delete":
                    session.delete(path)
                elif action == "rename":
                    session.rename(path, other)
                else:
                    session.mkdir(path + b".d")
                    session.rmdir(path + b".d")
            except (OSError, pureftpd.Refuse):
                pass
            with session.quota.lock() as account:
                if account.size > limit or account.files > files or recount(self.home)[1] > limit:
                    os._exit(3)


class Ratios(unittest.TestCase):
    def test_ratio(self):
        for ul, dl, uploaded, downloaded, length, answer in (
                (0, 0, 0, 0, 10 ** 9, True), (1, 0, 0, 0, 10 ** 9, True), (0, 1, 0, 0, 10 ** 9, True),
                (1, 1, 0, 0, 1, False), (1, 1, 100, 0, 100, True), (1, 1, 100, 1, 100, False),
                (1, 5, 100, 0, 500, True), (1, 5, 100, 0, 504, True), (1, 5, 100, 0, 505, False),
                (3, 2, 10, 0, 7, True), (3, 2, 10, 0, 8, False)):
            with self.subTest((ul, dl, uploaded, downloaded, length)):
                self.assertEqual(pureftpd.ratio_allows(ul, dl, uploaded, downloaded, length), answer)


class Throttles(unittest.TestCase):
    def run_transfer(self, rate, size, socket_takes=1 << 30, late=0.0):
        """[(time, bytes)] of a transfer of `size` bytes whose wake-ups come `late` seconds late; its end; wake-ups."""
        now, moves, wakes = 100.0, [], 0
        throttle = pureftpd.Throttle(rate, now)
        while size:
            count = min(throttle.allowance(now), size, socket_takes)
            if count:
                throttle.spend(count)
                size -= count
                moves.append((now - 100, count))
                now += 1e-5
            else:
                now += throttle.wait(now) + late
                wakes += 1
        return moves, now + throttle.wait(now) - 100, wakes

    def test_five_seconds(self):
        for kb in (1, 100, 1000, 50000):
            for how in ({}, {"late": 0.002}, {"socket_takes": 65536}, {"late": 0.03}):
                with self.subTest(kb=kb, how=how):
                    rate = kb * 1024
                    moves, end, wakes = self.run_transfer(rate, rate * 5, **how)
                    self.assertAlmostEqual(end, 5, delta=0.05)
                    self.assertAlmostEqual(moves[-1][0], 5, delta=0.15 if kb > 1 else 0.3)
                    self.assertLessEqual(wakes, 140)
                    for start in range(10):                             # no burst: half a second's worth in 0.2 s
                        window = sum(n for t, n in moves if start / 2 <= t < start / 2 + 0.2)
                        self.assertLess(window, rate * 0.5)

    def test_a_stalled_transfer_does_not_catch_up_more_than_a_burst(self):
        throttle = pureftpd.Throttle(100000, 0.0)
        throttle.spend(throttle.allowance(0.0))
        self.assertLessEqual(throttle.allowance(60.0), 25000)

    def test_no_limit(self):
        throttle = pureftpd.Throttle(0, 0.0)
        throttle.spend(10 ** 12)
        self.assertGreater(throttle.allowance(0.0), 1 << 40)
        self.assertEqual(throttle.wait(0.0), 0.0)

    def test_receive_buffer(self):
        self.assertEqual([pureftpd.throttle_buffer(r) for r in (0, 1000, 102400, 51200000)], [0, 4096, 25600, 0])


# ==== Tests: transferlog ==========================================================================


class KeptLog:
    """A log that keeps its lines."""

    def __init__(self):
        self.lines = []

    def __getattr__(self, level):
        return lambda text: self.lines.append((level, text))


def zone(name):
    os.environ["TZ"] = name
    time.tzset()


class TransferLogTests(unittest.TestCase):
    def setUp(self):
        self.directory = tempfile.mkdtemp()
        self.addCleanup(shutil.rmtree, self.directory)
        self.log = KeptLog()
        self.path = os.path.join(self.directory, "log")

    def open(self, *forms):
        logs = pureftpd.transferlogs_open([(form, self.path + "." + form) for form in forms], self.log)
        for log in logs:
            self.addCleanup(os.close, log.fd)
        return logs

    def content(self, form, suffix=""):
        with open(self.path + "." + form + suffix, "rb") as file:
            return file.read()


TRANSFER = pureftpd.Transfer(True, b"/home/joe/a b\xc3\xa9%\".txt", 1234, 1.6, b"joe", "192.0.2.1", 0x6b0438af)


class TransferLogFormats(unittest.TestCase):
    """Lines as the original wrote them (1.0.50, -O FORMAT:PATH), at the second 1795438771."""

    LINES = {
        "clf": b'192.0.2.1 - joe [23/Nov/2026:%b] "PUT /home/joe/a%%20b%%C3%%A9%%25%%22.txt" 200 1234\n',
        "w3c": b"2026-11-23 12:59:31 192.0.2.1 []created /home/joe/a%%20b%%C3%%A9%%25%%22.txt 226 joe 1234\n",
        "stats": b"1795438771 6b0438af.%x joe 192.0.2.1 U 1234 2 /home/joe/a b\xc3\xa9%%\".txt\n",
        "xferlog": b"Mon Nov 23 %b 2026 2 192.0.2.1 1234 /home/joe/a_b\xc3\xa9%%\".txt b _ i r joe ftp 1 * c\n",
    }

    def setUp(self):
        self.addCleanup(zone, os.environ.get("TZ", "UTC"))

    def line(self, form, **changes):
        return pureftpd.TRANSFERLOG_FORMATS[form](TRANSFER._replace(**changes), 1795438771.9)

    def test_lines(self):
        for tz, clf, local in (("UTC0", b"12:59:31 -0000", b"12:59:31"), ("CET-1", b"13:59:31 +0100", b"13:59:31"),
                               ("NST3:30", b"09:29:31 -0330", b"09:29:31")):
            zone(tz)
            values = {"clf": clf, "w3c": (), "stats": os.getpid(), "xferlog": local}
            for form, expected in self.LINES.items():
                with self.subTest(form=form, tz=tz):
                    self.assertEqual(self.line(form), expected % values[form])

    def test_directions_modes_and_missing_values(self):
        zone("UTC0")
        down = dict(upload=False, user=b"", host="", ascii=True, seconds=0.4, size=0)
        self.assertIn(b'- - - [23/Nov/2026:12:59:31 -0000] "GET /', self.line("clf", **down))
        self.assertIn(b" - []sent /", self.line("w3c", **down))
        self.assertIn(b" - - D 0 0 /", self.line("stats", **down))
        self.assertRegex(self.line("xferlog", **down), rb" 2026 0 - 0 \S+ a _ o r - ftp 1 \* c\n$")

    def test_json(self):
        self.assertEqual(json.loads(self.line("json", complete=False)), {
            "time": 1795438771.9, "event": "upload", "session": "6b0438af.%x" % os.getpid(), "user": "joe",
            "host": "192.0.2.1", "path": "/home/joe/a b\u00e9%\".txt", "bytes": 1234, "seconds": 1.6,
            "complete": False})
        event = json.loads(pureftpd.json_event("rename", b"joe", "h", 1, 2.5, path=b"/a\xff",
                                               to=b"/b\x1b\xf0\x9f\x98\x80"))
        self.assertEqual((event["path"], event["path_hex"], event["to"]), ("/a\ufffd", "2f61ff", "/b\x1b\U0001f600"))
        self.assertNotIn("to_hex", event)

    def test_json_is_safe_to_look_at(self):
        line = pureftpd.json_line({"x": "\x1b\x9b\u202e\u2028\x7f\ud800\U000e0001", "host": os.fsdecode(b"\xff")})
        self.assertTrue(line.decode().rstrip("\n").isprintable())
        self.assertEqual(json.loads(line)["x"], "\x1b\x9b\u202e\u2028\x7f\ud800\U000e0001")

    @staticmethod
    def unescaped(text):
        return re.sub(rb"%(..)", lambda m: bytes([int(m[1], 16)]), text)

    def parsed(self, form, line):
        """(user, host, path) of one line, or as much of it as the format tells."""
        plain = self.unescaped
        if form == "clf":
            host, user, path = re.fullmatch(rb'([^ ]+) - ([^ ]+) \[[^]]{26}\] "PUT ([^ "]*)" 200 1234\n', line).groups()
            return plain(user), plain(host), plain(path)
        if form == "w3c":
            fields = line.rstrip(b"\n").split(b" ")
            self.assertEqual(len(fields), 8)
            return plain(fields[6]), plain(fields[2]), plain(fields[4])
        if form == "stats":
            fields = line[:-1].split(b" ", 7)
            path = re.sub(rb"\\(\\|x(..))", lambda m: bytes([int(m[2], 16)]) if m[2] else b"\\", fields[7])
            return plain(fields[2]), plain(fields[3]), path
        if form == "xferlog":
            fields = line.rstrip(b"\n").split(b" ")
            self.assertEqual(len(fields), 18)
            return plain(fields[13]), plain(fields[6]), fields[8]
        fields = json.loads(line)
        user, path = (bytes.fromhex(fields[k + "_hex"]) if k + "_hex" in fields else fields[k].encode()
                      for k in ("user", "path"))
        return user, fields["host"].encode("utf-8", "surrogateescape"), path

    def test_every_line_tells_user_host_and_path_again(self):
        choice = random.Random(5)
        pieces = [b"\n", b"\r", b"\0", b"\x1b[2J", b" ", b"  ", b'"', b"%0A", b"%", b"\\", b"\\x0a", b"[", b"]", b"\t",
                  b" 200 5\n", b'" 200 5', b"\x85", b"\xff", b"\xc3\xa9", b"\xe2\x80\xa8", b"\xf0\x9f\x98\x80", b"\x7f",
                  b"a", b"/", b" - ", b"127.0.0.1 - joe [", b"{}", b'","user":"root', b"\xed\xa0\x80"]
        for _ in range(1500):
            user, host, path = (b"".join(choice.choices(pieces, k=choice.randint(1, 6))) for _ in range(3))
            for form in pureftpd.TRANSFERLOG_FORMATS:
                line = self.line(form, user=user, host=os.fsdecode(host), path=b"/" + path)
                self.assertEqual((line.count(b"\n"), line[-1:]), (1, b"\n"), (form, line))
                self.assertFalse(re.search(rb"[\0-\x09\x0b-\x1f\x7f]", line), (form, line))
                told = b"/" + path
                if form == "xferlog":
                    told = re.sub(rb"[\0- \x7f]", b"_", told)
                self.assertEqual(self.parsed(form, line), (user, host, told), (form, line))

    def test_table_of_formats_is_the_table_of_the_option(self):
        for form in pureftpd.TRANSFERLOG_FORMATS:
            options, _ = pureftpd.options_parse(pureftpd.OPTIONS, ["-O", form + ":/x"], "pureftpd.py")
            self.assertEqual(options.altlog, ((form, "/x"),))


class TransferLogFiles(TransferLogTests):
    def test_several_at_once(self):
        logs = self.open("clf", "json", "w3c")
        pureftpd.transferlog_write(logs, TRANSFER)
        pureftpd.transferlog_event(logs, "login", b"joe", "h", 1.0)
        self.assertEqual([self.content(f).count(b"\n") for f in ("clf", "json", "w3c")], [1, 2, 5])
        self.assertEqual(stat.S_IMODE(os.stat(self.path + ".clf").st_mode), 0o600)

    def test_w3c_header_once_and_in_an_empty_file_of_logrotate(self):
        self.open("w3c")
        self.open("w3c")
        self.assertEqual(re.sub(rb"\d", b"9", self.content("w3c")).splitlines()[1:], [
            b"#Version: 9.9", b"#Date: 9999-99-99 99:99:99",
            b"#Fields: date time c-ip cs-method cs-uri-stem sc-status cs-username sc-bytes"])
        os.truncate(self.path + ".w3c", 0)
        self.open("w3c")
        self.assertTrue(self.content("w3c").startswith(b"#Software: "))

    def test_only_regular_files(self):
        with open(self.path, "wb"):
            os.symlink(self.path, self.path + ".clf")
        os.mkfifo(self.path + ".stats")
        os.mkdir(self.path + ".w3c")
        self.assertEqual(self.open("clf", "stats", "w3c", "json")[0].form, "json")
        self.assertEqual([level for level, _ in self.log.lines], ["error"] * 3)

    def test_descriptors(self):
        (log,) = self.open("clf")
        flags = fcntl.fcntl(log.fd, fcntl.F_GETFL)
        self.assertEqual(flags & (os.O_ACCMODE | os.O_APPEND), os.O_WRONLY | os.O_APPEND)
        self.assertFalse(os.get_inheritable(log.fd))

    def test_a_moved_log_is_replaced(self):
        logs = self.open("w3c")
        path = logs[0].path
        pureftpd.transferlog_write(logs, TRANSFER)
        pureftpd.transferlog_renew(logs[0], pureftpd.transferlog_open(path))
        os.rename(path, path + ".1")
        pureftpd.transferlog_write(logs, TRANSFER)
        pureftpd.transferlog_renew(logs[0], pureftpd.transferlog_open(path))
        self.assertTrue(os.path.samestat(os.stat(path), os.fstat(logs[0].fd)))
        self.assertFalse(os.get_inheritable(logs[0].fd))
        pureftpd.transferlog_write(logs, TRANSFER)
        self.assertEqual([self.content("w3c", s).count(b"\n") for s in (".1", "")], [6, 5])

    def test_a_full_disk_costs_lines_but_leaves_no_half_one(self):
        logs = self.open("clf")
        pureftpd.transferlog_write(logs, TRANSFER)
        size = len(self.content("clf"))
        soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
        self.addCleanup(signal.signal, signal.SIGXFSZ, signal.signal(signal.SIGXFSZ, signal.SIG_IGN))
        resource.setrlimit(resource.RLIMIT_FSIZE, (size + 20, hard))
        try:
            for _ in range(3):
                pureftpd.transferlog_write(logs, TRANSFER)
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
        self.assertEqual(len(self.content("clf")), size)
        self.assertEqual([level for level, _ in self.log.lines], ["warning"])
        pureftpd.transferlog_write(logs, TRANSFER)
        self.assertEqual(len(self.content("clf")), 2 * size)

    @unittest.skipUnless(os.path.exists("/dev/full"), "needs /dev/full")
    def test_no_space(self):
        fd = os.open("/dev/full", os.O_WRONLY)
        self.addCleanup(os.close, fd)
        pureftpd.TransferLog(fd, "clf", "/dev/full", self.log).write(b"x\n")
        self.assertEqual(self.log.lines, [
            ("warning", "transfer log /dev/full: No space left on device; its lines are being lost")])

    def test_a_stopped_process_that_holds_the_lock_stops_nobody(self):
        logs = self.open("clf")
        reading, writing = os.pipe()
        child = os.fork()
        if child == 0:
            fcntl.lockf(logs[0].fd, fcntl.LOCK_EX)
            os.write(writing, b"x")
            signal.pause()
        os.read(reading, 1)
        os.close(reading)
        os.close(writing)
        try:
            pureftpd.transferlog_write(logs, TRANSFER)
        finally:
            os.kill(child, signal.SIGKILL)
            os.waitpid(child, 0)
        self.assertEqual(self.content("clf").count(b"\n"), 1)

    def test_lines_of_many_writers_are_whole(self):
        children = []
        for number in range(4):
            child = os.fork()
            if child == 0:
                try:
                    logs = pureftpd.transferlogs_open([("json", self.path + ".json")], self.log)
                    for i in range(200):
                        pureftpd.transferlog_write(logs, TRANSFER._replace(path=b"/%d/" % number + b"x" * i * 5))
                    os._exit(0)
                finally:
                    os._exit(1)
            children.append(child)
        for child in children:
            self.assertEqual(os.waitpid(child, 0)[1], 0)
        lines = self.content("json").splitlines()
        self.assertEqual(len([json.loads(line) for line in lines]), 800)


# ==== Tests: scoreboard ===========================================================================


SCOREBOARD_PEER = Peer("192.0.2.7", 4242, "198.51.100.1", 21)


def dead_pid():
    """The pid of a process that has ended."""
    process = subprocess.Popen([sys.executable, "-c", ""])
    process.wait()
    return process.pid


class StateDirTest(unittest.TestCase):
    def setUp(self):
        self.base = tempfile.mkdtemp()
        self.addCleanup(shutil.rmtree, self.base)
        self.statedir = self.base + "/state"


class StateDirs(StateDirTest):
    def refused(self, why):
        with self.assertRaisesRegex(pureftpd.ConfigError, "^StateDir .*" + why):
            pureftpd.statedir_prepare(self.statedir)

    def test_it_is_made_private(self):
        pureftpd.statedir_prepare(self.statedir)
        found = os.stat(self.statedir)
        self.assertEqual((stat.S_IMODE(found.st_mode), found.st_uid), (0o700, os.geteuid()))

    def test_an_existing_one_becomes_private(self):
        os.mkdir(self.statedir)
        os.chmod(self.statedir, 0o755)
        pureftpd.statedir_prepare(self.statedir + "/")
        self.assertEqual(stat.S_IMODE(os.stat(self.statedir).st_mode), 0o700)

    def test_one_that_others_may_write_is_refused(self):
        os.mkdir(self.statedir)
        for mode in (0o770, 0o707, 0o1777, 0o720):
            os.chmod(self.statedir, mode)
            with self.subTest("%o" % mode):
                self.refused("writable by others")

    def test_a_link_is_refused_with_and_without_slash(self):
        os.mkdir(self.base + "/real")
        os.symlink("real", self.statedir)
        self.refused("link")
        self.statedir += "/"
        self.refused("link")

    def test_a_file_is_refused(self):
        open(self.statedir, "w").close()
        self.refused("not a directory")

    def test_a_missing_parent_is_an_error(self):
        self.statedir = self.base + "/no/state"
        self.refused("cannot create it: No such file")

    @unittest.skipUnless(os.geteuid() == 0, "needs root")
    def test_somebody_elses_is_refused_but_root_may_read(self):
        os.mkdir(self.statedir, 0o700)
        os.chown(self.statedir, 1234, 1234)
        self.refused("owned by uid 1234")
        self.assertEqual(pureftpd.scoreboard_read(self.statedir), [])

    def test_defaults(self):
        self.assertTrue(pureftpd.statedir_default().startswith("/"))


class Scoreboard(StateDirTest):
    def setUp(self):
        super().setUp()
        pureftpd.statedir_prepare(self.statedir)

    def claim(self, pid=None, account=None, peer=SCOREBOARD_PEER, now=1000):
        entry = pureftpd.scoreboard_claim(self.statedir, pid or os.getpid(), peer, now)
        self.addCleanup(entry.close)
        if account is not None:
            entry.login(account)
        return entry

    def read(self):
        return pureftpd.scoreboard_read(self.statedir)

    def raw(self, pid=None):
        with open("%s/client-%08d" % (self.statedir, pid or os.getpid()), "rb") as file:
            return file.read()

    def plant(self, pid, data):
        with open("%s/client-%08d" % (self.statedir, pid), "wb") as file:
            file.write(data)

    def test_the_bytes_are_the_originals(self):
        entry = self.claim(now=0x01020304)
        entry.login(b"alice")
        entry.update(pureftpd.SCOREBOARD_DOWNLOAD, b"/pub/x", total=0x1122334455, restart=7, current=9, now=0x05060708)
        data = self.raw()
        little = sys.byteorder == "little"
        number = lambda at, size: int.from_bytes(data[at:at + size], "little" if little else "big")  # noqa: E731
        self.assertEqual(len(data), 1456)
        self.assertEqual([number(0, 4), number(4, 4)], [2, os.getpid()])
        self.assertEqual((number(8, 2), data[10:16]), (2, b"\x10\x92" + bytes([192, 0, 2, 7])))
        self.assertEqual((number(136, 2), data[138:144]), (2, b"\x00\x15" + bytes([198, 51, 100, 1])))
        self.assertEqual([number(at, 8) for at in range(264, 304, 8)], [0x01020304, 0x05060708, 7, 0x1122334455, 9])
        self.assertEqual((data[304:310], data[432:439]), (b"alice\0", b"/pub/x\0"))

    def test_the_file_is_private_and_the_descriptor_ours_alone(self):
        entry = self.claim()
        found = os.stat(self.statedir + "/client-%08d" % os.getpid())
        self.assertEqual((stat.S_IMODE(found.st_mode), found.st_uid), (0o600, os.geteuid()))
        self.assertFalse(os.get_inheritable(entry.descriptor))

    def test_what_is_written_is_read(self):
        entry = self.claim()
        (record,) = self.read()
        self.assertEqual((record.pid, record.state, record.account, record.since), (os.getpid(), 1, b"?", 1000))
        self.assertEqual((record.peer, record.local), (("192.0.2.7", 4242), ("198.51.100.1", 21)))
        entry.login(b"bob")
        entry.update(pureftpd.SCOREBOARD_UPLOAD, b"a/b", now=1010.9)
        entry.progress(5 << 32)
        (record,) = self.read()
        self.assertEqual((record.state, record.account, record.filename, record.started, record.current),
                         (3, b"bob", b"a/b", 1010, 5 << 32))
        entry.update(pureftpd.SCOREBOARD_IDLE)
        (record,) = self.read()
        self.assertEqual((record.state, record.account, record.filename), (1, b"bob", b""))

    def test_addresses(self):
        scope = "%%%d" % 1
        for given, found in (("2001:db8::1", "2001:db8::1"), ("fe80::1" + "%lo", "fe80::1" + scope), ("", "")):
            if given.endswith("%lo") and sys.platform != "linux":
                continue
            with self.subTest(given):
                self.claim(peer=Peer(given, 1, "::1", 2))
                (record,) = self.read()
                self.assertEqual((record.peer[0], record.local), (found, ("::1", 2)))

    def test_long_names_are_cut(self):
        entry = self.claim(account=b"u" * 300)
        entry.update(pureftpd.SCOREBOARD_UPLOAD, b"begin" + b"x" * 2000 + b"end")
        (record,) = self.read()
        self.assertEqual(record.account, b"u" * 127)
        self.assertEqual((len(record.filename), record.filename[-4:], len(self.raw())), (1023, b"xend", 1456))

    def test_a_leftover_of_our_pid_is_replaced_and_not_followed(self):
        victim = self.base + "/victim"
        open(victim, "w").close()
        os.symlink(victim, self.statedir + "/client-%08d" % os.getpid())
        self.claim()
        self.assertEqual((os.path.getsize(victim), len(self.read())), (0, 1))
        self.claim(account=b"again")
        self.assertEqual([record.account for record in self.read()], [b"again"])

    def test_remove(self):
        self.claim()
        pureftpd.scoreboard_remove(self.statedir, os.getpid())
        pureftpd.scoreboard_remove(self.statedir, os.getpid())
        self.assertEqual(os.listdir(self.statedir), [])

    def test_entries_of_dead_processes_go(self):
        dead = dead_pid()
        self.claim(dead, b"ghost")
        self.claim(account=b"alive")
        self.assertEqual([record.account for record in self.read()], [b"alive"])
        self.assertEqual(os.listdir(self.statedir), ["client-%08d" % os.getpid()])
        self.claim(dead, b"alive")
        self.assertEqual(pureftpd.scoreboard_count(self.statedir, b"alive"), 1)

    def test_hostile_entries_harm_nobody(self):
        me = self.statedir + "/client-%08d"
        self.plant(os.getpid(), bytes(3))                                       # torn
        os.mkfifo(me % os.getppid())
        os.symlink("/etc/passwd", me % 1)
        for name in ("client-", "client-x", "client-00000000", "client-99999999999", "client--1", "other",
                     "client-\N{ARABIC-INDIC DIGIT ONE}"):
            open("%s/%s" % (self.statedir, name), "w").close()
        os.mkdir(self.statedir + "/client-00000002")
        self.assertEqual(self.read(), [])
        self.assertEqual(pureftpd.scoreboard_count(self.statedir, b"x"), 0)

    def test_a_hostile_record_is_made_sane(self):
        self.plant(os.getpid(), b"\xff" * 9000)
        (record,) = self.read()
        self.assertEqual(record.pid, os.getpid())
        self.assertEqual((record.since, record.started, record.restart, record.total, record.current), (0,) * 5)
        self.assertEqual((record.peer, len(record.account), len(record.filename)), (("", 0), 128, 1024))

    def test_debians_layout_is_read(self):
        self.claim(account=b"u" * 125).update(pureftpd.SCOREBOARD_DOWNLOAD, b"/a/file", total=10, current=5)
        data = self.raw()
        self.plant(os.getpid(), data[:432] + b"\0" + data[432:] + bytes(7))
        (record,) = self.read()
        self.assertEqual((record.account, record.filename, record.current), (b"u" * 125, b"/a/file", 5))

    def test_accounts_are_counted_whatever_their_case(self):
        self.claim(os.getpid(), b"Alice")
        self.claim(os.getppid(), b"aLICE")
        self.claim(1, b"alice2")
        count = lambda *args: pureftpd.scoreboard_count(self.statedir, *args)  # noqa: E731
        self.assertEqual((count(b"alice"), count(b"ALICE2"), count(b"al"), count(b"alice", os.getpid())), (2, 1, 0, 1))

    def test_a_session_writes_on_when_the_entry_is_gone_or_broken(self):
        entry = self.claim()
        pureftpd.scoreboard_remove(self.statedir, os.getpid())
        entry.update(pureftpd.SCOREBOARD_UPLOAD, b"x")
        with open(os.devnull) as readonly:
            broken = pureftpd.ScoreboardEntry(readonly.fileno(), 1, SCOREBOARD_PEER, 0)
            broken.update(pureftpd.SCOREBOARD_UPLOAD, b"x")
            broken.progress(1)

    def test_no_limit_admits(self):
        for limit in (None, 0):
            self.assertTrue(pureftpd.scoreboard_admit(self.statedir, self.claim(), b"a", limit))

    def test_a_limit_counts_the_others(self):
        self.claim(os.getppid(), b"a")
        entry = self.claim()
        self.assertFalse(pureftpd.scoreboard_admit(self.statedir, entry, b"A", 1))
        self.assertEqual(sorted(record.account for record in self.read()), [b"?", b"a"])
        self.assertTrue(pureftpd.scoreboard_admit(self.statedir, entry, b"A", 2))

    def test_logins_at_once_do_not_pass_the_limit_together(self):
        start, go = os.pipe()
        report, reporter = os.pipe()
        stay, leave = os.pipe()
        children = []
        for _ in range(8):
            pid = os.fork()
            if pid == 0:
                try:
                    os.close(leave)
                    entry = pureftpd.scoreboard_claim(self.statedir, os.getpid(), SCOREBOARD_PEER)
                    os.read(start, 1)
                    admitted = pureftpd.scoreboard_admit(self.statedir, entry, b"same", 3)
                    os.write(reporter, b"1" if admitted else b"0")
                    os.read(stay, 1)
                finally:
                    os._exit(0)
            children.append(pid)
        os.write(go, b"x" * 8)
        answers = b""
        while len(answers) < 8:
            answers += os.read(report, 8)
        self.assertEqual((answers.count(b"1"), pureftpd.scoreboard_count(self.statedir, b"same")), (3, 3))
        for descriptor in (leave, start, go, report, reporter, stay):
            os.close(descriptor)
        for pid in children:
            os.waitpid(pid, 0)
        self.assertEqual(self.read(), [])
        self.assertEqual(os.listdir(self.statedir), [])


# ==== Tests: uploadpipe ===========================================================================


class UploadpipeCollectedLog:
    """A log that keeps its warnings."""

    def __init__(self):
        self.lines = []

    def warning(self, text):
        self.lines.append(text)


class UploadPipeMessages(unittest.TestCase):
    def test_message(self):
        self.assertEqual(pureftpd.uploadpipe_message(b"joe", "/home/joe/é x".encode()),
                         b"\2joe\1/home/joe/\xc3\xa9 x\0")
        self.assertEqual(pureftpd.uploadpipe_message(b"u" * 200, b"/f"), b"\2" + b"u" * 127 + b"\1/f\0")

    def test_what_could_forge_a_message_is_refused(self):
        for account, path in ((b"a", b"/x\1/y"), (b"a", b"/x\0\2root\1/etc/shadow"), (b"a\1/etc/shadow\0", b"/x"),
                              (b"a", b"/x\n"), (b"a", b"/\x7f"), (b"\2", b"/x"), (b"a", b"x"), (b"a", b""),
                              (b"a", b"/" + b"x" * 4093)):
            with self.subTest((account, path[:30])), self.assertRaises(ValueError):
                pureftpd.uploadpipe_message(account, path)

    def test_parse(self):
        for data, wanted in (
                (b"\2joe\1/f", (b"joe", b"/f")),
                (b"\2\1/f", (b"", b"/f")),
                (b"rubbish\1\2cut off\1/par\2joe\1/f", (b"joe", b"/f")),
                (b"joe\1/f", None), (b"", None), (b"\2joe", None), (b"\2joe\1f", None), (b"\2joe\1", None),
                (b"\2joe\1/a\1/b", None), (b"\2jo\x1be\1/f", None), (b"\2joe\1/f\x7f", None),
                (b"\2" + b"u" * 128 + b"\1/f", None)):
            with self.subTest(data):
                self.assertEqual(pureftpd.uploadpipe_parse(data), wanted)


class UploadPipes(unittest.TestCase):
    def setUp(self):
        self.base = tempfile.mkdtemp()
        self.addCleanup(shutil.rmtree, self.base)
        self.statedir = self.base + "/state"
        self.fifo = self.statedir + "/pure-ftpd.upload.pipe"
        self.lock = self.statedir + "/pure-ftpd.upload.lock"
        self.log = UploadpipeCollectedLog()
        pureftpd.statedir_prepare(self.statedir)

    def create(self):
        holder = pureftpd.uploadpipe_create(self.statedir)
        self.addCleanup(os.close, holder)
        return holder

    def open(self):
        pipe = pureftpd.uploadpipe_open(self.statedir)
        self.addCleanup(pipe.close)
        return pipe

    def write(self, pipe, path=b"/f", wait=0.0):
        return pureftpd.uploadpipe_write(pipe, b"joe", path, self.log, wait)

    def fill(self, pipe):
        while self.write(pipe, b"/" + b"x" * 4000):
            pass
        del self.log.lines[:]
        pipe.lost = 0


class UploadPipe(UploadPipes):
    def test_create_makes_both_private_and_twice_is_once(self):
        self.create()
        before = os.stat(self.fifo)
        self.create()
        self.assertEqual(os.stat(self.fifo).st_ino, before.st_ino)
        self.assertTrue(stat.S_ISFIFO(before.st_mode))
        self.assertEqual([stat.S_IMODE(os.stat(path).st_mode) for path in (self.fifo, self.lock)], [0o600, 0o600])

    def test_messages_wait_for_a_reader_that_comes_later(self):
        self.create()
        for path in (b"/1", b"/2"):
            pipe = pureftpd.uploadpipe_open(self.statedir)
            self.assertTrue(self.write(pipe, path))
            pipe.close()
        reader = pureftpd.uploadpipe_reader(self.statedir)
        self.addCleanup(os.close, reader)
        buffer = bytearray()
        read = [pureftpd.uploadpipe_next(reader, buffer, 0) for _ in range(3)]
        self.assertEqual(read, [(b"joe", b"/1"), (b"joe", b"/2"), None])

    def test_a_session_cannot_read_the_pipe(self):
        self.create()
        pipe = self.open()
        self.write(pipe)
        with self.assertRaises(OSError):
            os.read(pipe.fifo, 1)
        self.assertFalse(os.get_inheritable(pipe.fifo) or os.get_inheritable(pipe.lock))

    def test_garbage_takes_no_memory_and_hides_nothing(self):
        holder = self.create()
        buffer = bytearray()
        for _ in range(20):
            os.write(holder, b"x" * 4096)
            self.assertIsNone(pureftpd.uploadpipe_next(holder, buffer, 0))
        self.assertLessEqual(len(buffer), 8192)
        os.write(holder, b"\0\0\1\2" * 50 + b"\2joe\1/f\0")
        self.assertEqual(pureftpd.uploadpipe_next(holder, buffer, 0), (b"joe", b"/f"))
        self.assertEqual(len(buffer), 0)

    def test_a_message_in_two_parts_is_one(self):
        holder = self.create()
        buffer = bytearray()
        os.write(holder, b"\2jo")
        self.assertIsNone(pureftpd.uploadpipe_next(holder, buffer, 0))
        os.write(holder, b"e\1/f\0")
        self.assertEqual(pureftpd.uploadpipe_next(holder, buffer, 0), (b"joe", b"/f"))

    def test_a_name_that_cannot_be_announced_is_logged_and_harmless(self):
        holder = self.create()
        self.assertFalse(self.write(self.open(), b"/x\0\2root\1/etc/shadow\0"))
        self.assertEqual(select.select([holder], [], [], 0)[0], [])
        self.assertEqual(self.log.lines, [
            "Upload script not called for /x\\x00\\x02root\\x01/etc/shadow\\x00: its name holds control characters"])

    def test_a_full_pipe_is_waited_for_once_and_warned_of_once(self):
        holder = self.create()
        pipe = self.open()
        self.fill(pipe)
        began = time.monotonic()
        self.assertFalse(self.write(pipe, b"/" + b"x" * 4000, wait=0.1))
        waited = time.monotonic() - began
        self.assertTrue(0.1 <= waited < 2, waited)
        began = time.monotonic()
        for _ in range(50):
            self.assertFalse(self.write(pipe, b"/" + b"x" * 4000, wait=5))
        self.assertLess(time.monotonic() - began, 2)
        self.assertEqual(len(self.log.lines), 1)
        self.assertIn("full; is uploadscript running?", self.log.lines[0])
        os.read(holder, 100000)
        self.assertTrue(self.write(pipe))
        self.assertEqual(self.log.lines[1:], ["Upload script is called again; 51 uploads were left out"])

    def test_room_made_in_time_loses_nothing(self):
        holder = self.create()
        pipe = self.open()
        self.fill(pipe)
        with mock.patch("pureftpd.time.sleep", lambda _: os.read(holder, 100000)):
            self.assertTrue(self.write(pipe, b"/" + b"y" * 4000, wait=5))
        self.assertEqual(self.log.lines, [])

    def test_a_held_lock_does_not_hold_an_upload_for_ever(self):
        import fcntl
        self.create()
        pipe = self.open()
        ready, told = os.pipe()
        pid = os.fork()
        if pid == 0:
            try:
                with open(self.lock, "r+b") as file:
                    fcntl.lockf(file, fcntl.LOCK_EX)
                    os.write(told, b"x")
                    time.sleep(60)
            finally:
                os._exit(0)
        try:
            os.read(ready, 1)
            self.assertFalse(self.write(pipe, wait=0.05))
        finally:
            os.kill(pid, 9)
            os.waitpid(pid, 0)
            os.close(ready)
            os.close(told)
        self.assertIn("lock", self.log.lines[0])
        self.assertTrue(self.write(pipe))

    def test_without_priv_there_is_no_pipe_and_a_dead_one_is_noticed(self):
        os.close(pureftpd.uploadpipe_create(self.statedir))
        with self.assertRaisesRegex(pureftpd.ConfigError, "no server holds it open"):
            pureftpd.uploadpipe_open(self.statedir)
        holder = pureftpd.uploadpipe_create(self.statedir)
        pipe = self.open()
        os.close(holder)
        self.assertFalse(self.write(pipe))
        self.assertIn("Broken pipe", self.log.lines[0])

    def test_writers_at_once_do_not_mix(self):
        holder = self.create()
        children = []
        for number in range(4):
            pid = os.fork()
            if pid == 0:
                try:
                    pipe = pureftpd.uploadpipe_open(self.statedir)
                    name = b"/" + bytes([65 + number]) * (600 * number + 10)
                    lost = sum(not self.write(pipe, name, wait=20) for _ in range(50))
                finally:
                    os._exit(lost)
            children.append(pid)
        buffer = bytearray()
        found = [pureftpd.uploadpipe_next(holder, buffer, 20) for _ in range(200)]
        self.assertEqual([os.waitpid(pid, 0)[1] for pid in children], [0] * 4)
        for number in range(4):
            path = b"/" + bytes([65 + number]) * (600 * number + 10)
            self.assertEqual(sum(message == (b"joe", path) for message in found), 50)


class UploadPipeAttacks(UploadPipes):
    """Somebody could write in StateDir (they cannot) and waits for root to open what they left there."""

    def refused(self, why):
        for function in (pureftpd.uploadpipe_create, pureftpd.uploadpipe_open):
            with self.subTest(function.__name__), self.assertRaisesRegex(pureftpd.ConfigError, why):
                function(self.statedir)
        if not self.victim_is_lock:
            with self.assertRaisesRegex(pureftpd.ConfigError, why):
                pureftpd.uploadpipe_reader(self.statedir)

    def attack(self, why, plant):
        """Both files, replaced in turn by what `plant` makes, are refused with `why`."""
        for path in (self.fifo, self.lock):
            self.create()
            self.victim_is_lock = path == self.lock
            os.rename(path, self.base + "/good")
            plant(path)
            with self.subTest(path):
                self.refused(why)
            os.unlink(path)
            os.rename(self.base + "/good", path)

    def like_the_real_one(self, path, mode=0o600):
        if self.victim_is_lock:
            open(path, "w").close()
        else:
            os.mkfifo(path)
            self.addCleanup(os.close, os.open(path, os.O_RDWR | os.O_NONBLOCK))     # or it would be ENXIO
        os.chmod(path, mode)

    def test_a_link_even_to_the_real_one(self):
        self.attack("a link", lambda path: os.symlink(self.base + "/good", path))
        self.attack("a link", lambda path: os.symlink(self.base + "/nothing", path))
        self.assertFalse(os.path.lexists(self.base + "/nothing"))

    def test_another_kind_of_file(self):
        def other_kind(path):
            self.victim_is_lock = not self.victim_is_lock
            self.like_the_real_one(path)
            self.victim_is_lock = not self.victim_is_lock
        self.attack("not a file of the right kind", other_kind)

    def test_a_directory(self):
        for path in (self.fifo, self.lock):
            self.create()
            self.victim_is_lock = path == self.lock
            os.unlink(path)
            os.mkdir(path)
            self.refused("directory")
            os.rmdir(path)

    def test_wrong_modes(self):
        for mode in (0o644, 0o620, 0o602, 0o700, 0o4600, 0o400):
            with self.subTest("%o" % mode):
                self.attack("mode %04o" % mode if os.geteuid() == 0 or mode & 0o200 else ".",
                            lambda path, mode=mode: self.like_the_real_one(path, mode))

    def test_a_second_name(self):
        self.attack("2 names", lambda path: os.link(self.base + "/good", path))

    @unittest.skipUnless(os.geteuid() == 0, "needs root")
    def test_another_owner(self):
        def others(path):
            self.like_the_real_one(path)
            os.chown(path, 1234, -1)
        self.attack("owned by uid 1234", others)

    def swapping(self, victim, swap):
        """An os.open that moves `victim` away after opening it, and lets `swap` put something else there."""
        real_open = os.open

        def swapping_open(path, *args, **kwargs):
            descriptor = real_open(path, *args, **kwargs)
            if path == os.path.basename(victim):
                os.rename(victim, self.base + "/moved")
                swap(victim)
            return descriptor
        return swapping_open

    def test_swapped_between_opening_and_looking(self):
        for victim in (self.fifo, self.lock):
            for swap, why in ((self.like_the_real_one, "replaced"),
                              (lambda path: os.symlink(self.base + "/moved", path), "replaced"),
                              (lambda path: None, "No such file")):
                self.create()
                self.victim_is_lock = victim == self.lock
                with self.subTest(why), mock.patch("pureftpd.os.open", self.swapping(victim, swap)), \
                        self.assertRaisesRegex(pureftpd.ConfigError, why):
                    pureftpd.uploadpipe_open(self.statedir)
                if os.path.lexists(victim):
                    os.unlink(victim)

    def test_nothing_stays_open_after_a_refusal(self):
        self.create()
        os.unlink(self.fifo)
        self.victim_is_lock = False
        self.like_the_real_one(self.fifo, 0o666)
        lowest = os.dup(0)
        os.close(lowest)
        self.refused("mode 0666")
        again = os.dup(0)
        os.close(again)
        self.assertEqual(again, lowest)


# ==== Tests: protocol =============================================================================


PROTOCOL_ORIGINAL = shlex.split(os.environ.get("PUREFTPD", ""))
ROOT = os.geteuid() == 0
EXAM_UID, EXAM_FTP_UID = (12345, 12346) if ROOT else (os.geteuid(), os.geteuid())
EXAM_SECONDS = 20                   # after which whoever waits for the server gives up
HERE = os.path.dirname(os.path.abspath(pureftpd.__file__))
# Servers start as pureftpd.py restarts itself: what packages have left for site to load takes longer than all else (40 ms).
EXAM_PYTHON = [sys.executable, "-S"]
EXAM_PATH = os.pathsep.join([HERE, *(path for path in sys.path if path.endswith("-packages"))])
# What a test would otherwise wait for. The anonymous user is one that need not exist on this machine.
EXAM_WRAPPER = """
import os, sys, types
import pureftpd
pureftpd.FAILURE_SECONDS = 0.01
pureftpd.CWD_FAILURE_SECONDS = 0.0001
pureftpd.anonymous_user = lambda: types.SimpleNamespace(
    pw_name="ftp", pw_uid=%d, pw_gid=%d, pw_dir=os.environ["FTP_ANON_DIR"])
%%s
sys.exit(pureftpd.main(["pureftpd.py", *sys.argv[1:]]))
""" % (EXAM_FTP_UID, EXAM_FTP_UID)


def deadline_socket(sock):
    sock.settimeout(EXAM_SECONDS)
    return sock


class NamesOfNetwork(unittest.TestCase):
    """What a login asks the name service, which answers these tests as they like."""

    RULES = ((None, "203.0.113.7"), (None, "ftp.example"), (None, "gone.example"))

    def ask(self, rules, by_name=None, by_address=None, dontresolve=False):
        """(host, rules, lines of the log)"""
        lines = []
        setup = mock.Mock(options=mock.Mock(forcepassiveip=rules, dontresolve=dontresolve),
                          privileges=pureftpd.Privileges(False, os.getuid(), os.getgid(), "me"))
        setup.log.warning = lines.append

        def hang(*_):
            signal.pause()

        with mock.patch.object(socket, "getaddrinfo", by_name or hang), mock.patch.object(socket, "getnameinfo", by_address or hang), \
                mock.patch.object(pureftpd, "NAME_SECONDS", 1):
            return (*pureftpd.names_needed(setup, Peer("192.0.2.1", 4000, "10.0.0.1", 21)), lines)

    @staticmethod
    def by_name(name, *_):
        if name == b"gone.example":
            raise socket.gaierror(socket.EAI_NONAME, "Name or service not known")
        return [(socket.AF_INET, socket.SOCK_STREAM, 6, "", ("198.51.100.%d" % len(name), 0))]

    def test_what_is_asked(self):
        host, rules, lines = self.ask(self.RULES, self.by_name, lambda *_: ("client.example", "0"))
        self.assertEqual((host, rules), ("client.example", ((None, "203.0.113.7"), (None, "198.51.100.11"))))
        self.assertEqual(lines, ["ForcePassiveIP (-P): gone.example has no IPv4 address now, PASV tells another address"])

    def test_nothing_is_asked_for_addresses_under_dont_resolve(self):
        self.assertEqual(self.ask(self.RULES[:1], dontresolve=True), ("192.0.2.1", self.RULES[:1], []))

    def test_a_name_server_for_clients_that_is_silent_loses_no_address_for_pasv(self):
        host, rules, lines = self.ask(self.RULES[:2], self.by_name)
        self.assertEqual((host, rules, lines), ("192.0.2.1", ((None, "203.0.113.7"), (None, "198.51.100.11")), []))

    def test_a_name_that_is_never_answered_loses_no_address_of_others(self):
        host, rules, lines = self.ask((*self.RULES[1:], self.RULES[0]))
        self.assertEqual((host, rules, len(lines)), ("192.0.2.1", ((None, "203.0.113.7"),), 2))


class ExamDaemon:
    """A whole server on a port of its own, and the lines of its log."""

    def __init__(self, place, switches, patches=""):
        self.lines, self.news = [], threading.Condition()
        self.directory = directory = tempfile.mkdtemp(dir=place)
        os.chmod(directory, 0o755)
        environment = dict(os.environ, PYTHONPATH=EXAM_PATH, FTP_ANON_DIR=os.path.join(place, "ftp"), PYTHONDONTWRITEBYTECODE="1",
                           TZ="UTC")
        self.process = subprocess.Popen(
            [*EXAM_PYTHON, "-c", EXAM_WRAPPER % patches, "-S", "127.0.0.1,0", "-f", "stderr", "-H", "--banafter", "0",
             "--statedir", os.path.join(directory, "state"), "-g", os.path.join(directory, "pid"), *switches],
            env=environment, cwd=directory, stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE)
        self.reader = threading.Thread(target=self.collect)
        self.reader.start()
        try:
            self.port = int(self.wait_for(r"Listening on \S+ port (\d+)").group(1))
        except BaseException:
            self.stop()
            raise

    def collect(self):
        for line in self.process.stderr:
            with self.news:
                self.lines.append(line.decode("utf-8", "replace"))
                self.news.notify_all()
        with self.news:
            self.lines.append("(end of log)")
            self.news.notify_all()

    def wait_for(self, pattern):
        """The match of the first line that holds `pattern`; AssertionError when none comes."""
        def found():
            hits = [match for match in (re.search(pattern, line) for line in self.lines) if match]
            return hits[0] if hits else self.lines[-1:] == ["(end of log)"]
        with self.news:
            match = self.news.wait_for(found, EXAM_SECONDS)
        if match in (True, False):
            raise AssertionError("no line with %s in:\n%s" % (pattern, "".join(self.lines)))
        return match

    def connect(self):
        return deadline_socket(socket.create_connection(("127.0.0.1", self.port), EXAM_SECONDS))

    def children(self):
        """The processes that the daemon has forked; none where the kernel does not tell."""
        try:
            with open("/proc/%d/task/%d/children" % (self.process.pid, self.process.pid)) as file:
                return [int(pid) for pid in file.read().split()]
        except OSError:
            return []

    def stop(self):
        """End the daemon. AssertionError when something of it stays."""
        children = self.children()
        self.process.terminate()
        try:
            self.process.wait(EXAM_SECONDS)
        finally:
            self.process.kill()
            self.process.wait()
            left = [pid for pid in children if os.path.exists("/proc/%d" % pid)]
            for pid in left:
                os.kill(pid, signal.SIGKILL)
            self.reader.join()
            self.process.stderr.close()
        if left:
            raise AssertionError("processes are left behind:\n" + "".join(self.lines[-20:]))


class ExamInetd:
    """The server of PUREFTPD, started for each client as inetd does."""

    def __init__(self, switches):
        self.switches, self.processes = switches, []

    def connect(self):
        with socket.create_server(("127.0.0.1", 0)) as listener:
            ours = socket.create_connection(listener.getsockname())
            theirs = listener.accept()[0]
        with theirs:
            self.processes.append(subprocess.Popen([*PROTOCOL_ORIGINAL, *self.switches], stdin=theirs, stdout=theirs))
        return deadline_socket(ours)

    def stop(self):
        for process in self.processes:
            process.kill()
            process.wait()


class ExamClient:
    """A client that says what it is told to, and keeps the whole exchange for the report of a failure."""

    def __init__(self, sock):
        self.sock, self.buffer, self.history = sock, b"", []

    def close(self):
        self.sock.close()

    def send(self, data):
        self.history.append(b"> " + data[:200])
        self.sock.sendall(data)

    def line(self):
        while b"\n" not in self.buffer:
            data = self.sock.recv(65536)
            if not data:
                raise EOFError("closed by the server after:\n" + self.exchange())
            self.buffer += data
        line, _, self.buffer = self.buffer.partition(b"\n")
        self.history.append(b"< " + line)
        return line + b"\n"

    def exchange(self):
        return "\n".join(line.decode("utf-8", "backslashreplace") for line in self.history[-40:])

    def reply(self):
        """(code, the whole reply)."""
        first = text = self.line()
        while first[3:4] == b"-" and not (text[:3] == first[:3] and text[3:4] == b" "):
            text = self.line()
            first += text
        return int(first[:3]), first

    def say(self, command):
        """The (code, reply) to a command."""
        self.send((command if isinstance(command, bytes) else command.encode()) + b"\r\n")
        return self.reply()

    def code(self, command):
        return self.say(command)[0]

    def at_end(self):
        """Whether the server has closed the connection, all its replies read."""
        try:
            return not self.buffer and not self.sock.recv(1)
        except ConnectionResetError:
            return True

    def passive(self, command="EPSV"):
        """A data connection."""
        code, text = self.say(command)
        if code == 229:
            port = int(re.search(rb"\|(\d+)\|", text).group(1))
        elif code == 227:
            high, low = re.search(rb"(\d+),(\d+)\)", text).groups()
            port = int(high) * 256 + int(low)
        else:
            raise AssertionError(self.exchange())
        host = self.sock.getpeername()[0]
        return deadline_socket(socket.create_connection((host, port), EXAM_SECONDS))

    def active(self, command="PORT"):
        """A socket that waits for the data connection."""
        listener = deadline_socket(socket.create_server((self.sock.getsockname()[0], 0)))
        host, port = listener.getsockname()[:2]
        if command == "PORT":
            code = self.code("PORT %s,%d,%d" % (host.replace(".", ","), port >> 8, port & 255))
        else:
            code = self.code("EPRT |1|%s|%d|" % (host, port))
        if code != 200:
            listener.close()
            raise AssertionError(self.exchange())
        return listener

    def fetch(self, command, data=None):
        """(code, reply, bytes) of a download or listing; code is the first that is not 150."""
        with data or self.passive() as data:
            code, text = self.say(command)
            if code != 150:
                return code, text, b""
            got = b"".join(iter(lambda: data.recv(1 << 20), b""))
        return (*self.reply(), got)

    def store(self, command, content, data=None):
        """(code, reply) of an upload."""
        with data or self.passive() as data:
            code, text = self.say(command)
            if code != 150:
                return code, text
            data.sendall(content)
        return self.reply()


class Exam(unittest.TestCase):
    """Clients of servers that are started once per class and set of switches.

    With PUREFTPD="/usr/sbin/pure-ftpd -f none" in the environment the original sits the same exam, as far as it can.
    """

    def setUp(self):
        self.refresh()

    @classmethod
    def setUpClass(cls):
        cls.place = tempfile.mkdtemp()
        cls.addClassCleanup(shutil.rmtree, cls.place, ignore_errors=True)
        os.chmod(cls.place, 0o755)
        cls.servers = {}
        hashed = pureftpd.crypt_in_python(b"secret", b"$1$saltsalt$")
        cls.users = os.path.join(cls.place, "users.pdb")
        records = []
        for name, home, more in ((b"alice", b"alice/./", b""), (b"bob", b"bob", b""), (b"once", b"alice/./", b":::::1"),
                                 (b"quota", b"quota/./", b"::::::3:5000"), (b"banner", b"banner/./", b""),
                                 (b"lost", b"nowhere/./", b"")):
            records.append((name, b"%s:%d:%d::%s/%s%s" % (hashed, EXAM_UID, EXAM_UID, os.fsencode(cls.place), home,
                                                          more)))
        with open(cls.users, "wb") as file:
            file.write(pureftpd.puredb_build(records))

    def refresh(self):
        """Homes as each test finds them."""
        for name, uid in (("alice", EXAM_UID), ("bob", EXAM_UID), ("quota", EXAM_UID), ("banner", EXAM_UID),
                          ("ftp", EXAM_FTP_UID), ("outside", EXAM_UID)):
            path = os.path.join(self.place, name)
            for directory, names, _ in os.walk(path):
                for below in names:
                    if not os.path.islink(os.path.join(directory, below)):
                        os.chmod(os.path.join(directory, below), 0o700)
            shutil.rmtree(path, ignore_errors=True)
            os.mkdir(path)
            self.give(path, uid)
        self.home, self.ftp = os.path.join(self.place, "alice"), os.path.join(self.place, "ftp")

    @staticmethod
    def give(path, uid=EXAM_UID):
        if ROOT:
            os.chown(path, uid, uid, follow_symlinks=False)

    def put(self, name, content=b"", uid=EXAM_UID, base=None):
        """Make a file in alice's home."""
        path = os.path.join(os.fsencode(base or self.home), os.fsencode(name))
        with open(path, "wb") as file:
            file.write(content)
        self.give(path, uid)
        return path

    def make_dir(self, name, uid=EXAM_UID, base=None):
        path = os.path.join(os.fsencode(base or self.home), os.fsencode(name))
        os.mkdir(path)
        self.give(path, uid)
        return path

    def content(self, name, base=None):
        with open(os.path.join(os.fsencode(base or self.home), os.fsencode(name)), "rb") as file:
            return file.read()

    def server(self, *switches, patches=""):
        key = switches, patches
        if key not in self.servers:
            switches = ("-l", "puredb:" + self.users, *switches)
            self.servers[key] = ExamInetd(switches) if PROTOCOL_ORIGINAL else ExamDaemon(self.place, switches, patches)
            self.addClassCleanup(self.servers[key].stop)
        return self.servers[key]

    def client(self, *switches, user="alice", patches=""):
        """A client that has been greeted, and logged in unless `user` is None."""
        client = ExamClient(self.server(*switches, patches=patches).connect())
        self.addCleanup(client.close)
        self.assertEqual(client.reply()[0], 220, client.exchange())
        if user == "ftp":
            self.assertEqual(client.code("USER ftp"), 230, client.exchange())
        elif user:
            self.assertEqual(client.code("USER " + user), 331, client.exchange())
            self.assertEqual(client.code("PASS secret"), 230, client.exchange())
        if user:
            self.assertEqual(client.code("TYPE I"), 200, client.exchange())
        return client

    def talk(self, script, *switches, user="alice"):
        """Play lines of `COMMAND -> code text`; `-> 522/229` when the original answers otherwise.

        `-` stands for no answer, `*` for any.

        What is expected of the original is its code; ours must also hold the text. A NOOP at the end finds surplus
        replies.
        """
        client = self.client(*switches, user=user)
        self.play(client, script)
        return client

    def play(self, client, script):
        for line in script.strip().splitlines():
            command, _, wanted = line.strip().partition("-> ")
            command = command.rstrip()
            codes, _, text = wanted.partition(" ")
            ours, _, theirs = codes.partition("/")
            code = theirs if theirs and PROTOCOL_ORIGINAL else ours
            client.send(command.encode() + b"\r\n")
            if code == "-":
                continue
            got, reply = client.reply()
            if code != "*":
                self.assertEqual(str(got), code, "after `%s` in:\n%s" % (command, client.exchange()))
            if not PROTOCOL_ORIGINAL:
                self.assertIn(text.encode(), reply, client.exchange())
            if code in ("221", "421"):
                self.assertTrue(client.at_end(), client.exchange())
                return
        self.assertEqual(client.code("NOOP"), 200, client.exchange())

    @contextlib.contextmanager
    def told(self, client):
        """Failures inside show the exchange."""
        try:
            yield
        except AssertionError as error:
            raise AssertionError("%s\n%s" % (error, client.exchange())) from None


class Strangers(Exam):
    """Facts 3, 4 and 5 before the login."""

    def test_they_are_answered_what_needs_no_login(self):
        self.talk("""
            NOOP        -> 200
            SYST        -> 215 UNIX Type: L8
            FEAT        -> 211
            HELP        -> 214
            TYPE I      -> 200
            MODE S      -> 200
            STRU F      -> 200
            ACCT        -> 202
            OPTS MLST x -> 200
            CLNT x      -> 200/530
            PBSZ 0      -> 503
            PROT P      -> 503
            QUIT        -> 221
        """, "-E", user=None)

    def test_they_learn_nothing(self):
        verbs = """CWD CDUP PWD XPWD PORT EPRT PASV P@SW EPSV ESTA ESTP PRET ALLO RETR REST STOR APPE STOU DELE RNFR
                   RNTO MKD RMD LIST NLST MLST MLSD STAT ABOR SIZE MDTM MFMT SITE REIN SMNT XYZZY LANG HOST 4"""
        self.talk("".join("%s x -> 530\n%s -> 530\n" % (verb, verb) for verb in verbs.split()), "-E", user=None)

    def test_they_are_told_what_is_missing(self):
        self.talk("""
            TYPE   -> 501
            MODE   -> 501
            STRU   -> 501
            MODE B -> 504
            STRU R -> 504
            TYPE E -> 504
            TYPE L7 -> 504
            TYPE L -> 200
            TYPE L8 -> 200
            TYPE L 8 -> 200
            TYPE ASCII -> 200
            type a -> 200
        """, "-E", user=None)

    def test_order_of_the_login(self):
        self.talk("""
            PASS secret -> 530
            USER alice  -> 331
            PASS wrong  -> 530
            PASS secret -> 230
            USER alice  -> 530
            PASS secret -> 530
        """, "-E", user=None)

    def test_nobody_without_a_name(self):
        client = self.client("-E", user=None)
        self.assertEqual(client.code("USER"), 530)
        self.assertTrue(client.at_end())

    def test_six_wrong_passwords_are_enough(self):
        if PROTOCOL_ORIGINAL:
            self.skipTest("a minute of delays")
        client = self.client("-E", user=None)
        for _ in range(5):
            self.assertEqual((client.code("USER alice"), client.code("PASS wrong")), (331, 530))
        self.assertEqual((client.code("USER alice"), client.code("PASS wrong")), (331, 530))
        self.assertTrue(client.at_end())

    def test_passwords_that_are_too_long_count_nothing(self):
        client = self.client("-E", user=None)
        client.code("USER alice")
        for _ in range(10):
            self.assertEqual(client.code("PASS " + "x" * 512), 530)
        self.assertEqual(client.code("PASS secret"), 230)

    def test_long_names_are_cut(self):
        self.talk("USER %s -> 331\nPASS x -> 530" % ("x" * 4000), "-E", user=None)

    def test_a_home_that_is_missing(self):
        client = self.client("-E", user=None)
        self.assertEqual((client.code("USER lost"), client.code("PASS secret")), (331, 421))
        self.assertTrue(client.at_end())
        if not PROTOCOL_ORIGINAL:
            self.server("-E").wait_for(r"ERROR.*the home /\S+ of lost: No such file or directory \(-j makes")

    def test_web_browsers_are_sent_away(self):
        for verb in ("CONNECT", "delete", "GET", "Head", "OPTIONS", "POST", "PUT"):
            for user in (None, "alice"):
                with self.subTest(verb, user=user):
                    client = self.client("-E", user=user)
                    client.send(b"%s / HTTP/1.0\r\nDELE x\r\n" % verb.encode())
                    self.assertEqual(client.reply()[0], 500)
                    self.assertTrue(client.at_end())

    def test_lines(self):
        for user, unknown in ((None, 530), ("alice", 500)):
            with self.subTest(user=user):
                client = self.client("-E", user=user)
                # empty lines and lines that begin oddly: no answer; LF alone ends a line, one CR before it goes
                client.send(b"\r\n\n noop\r\n\tnoop\r\n-noop\r\n\x00noop\r\n_\r\nnoop\nNoOp\r\n")
                self.assertEqual([client.reply()[0] for _ in range(2)], [200, 200])
                if not PROTOCOL_ORIGINAL:                        # which says nothing
                    self.assertEqual(client.code(b"NOOP\tx"), unknown)      # a TAB separates nothing
                self.assertEqual(client.code(b"NOOP "), 200)
                self.assertEqual(client.code(b"NOOP x"), 200)
                self.assertEqual(client.code(b"\xff\xf4\xff\xf2NOOP") if not PROTOCOL_ORIGINAL else 200, 200)
                client.send(b"SYST\r\nNO")
                self.assertEqual(client.reply()[0], 215)
                client.send(b"OP\r\nNOOP\r\n")
                self.assertEqual([client.reply()[0] for _ in range(2)], [200, 200])
                self.assertEqual(client.code("SYST"), 215)

    def test_a_line_of_a_mebibyte_ends_the_connection(self):
        for user in (None, "alice"):
            with self.subTest(user=user):
                client = self.client("-E", user=user)
                with contextlib.suppress(ConnectionError):
                    client.send(b"x" * (1 << 20))
                self.assertEqual(client.reply()[0], 421)
                self.assertTrue(client.at_end())

    def test_the_longest_line(self):
        client = self.client("-E")
        self.assertEqual(client.code("NOOP " + "x" * 4000), 200)

    def flood(self, client, count):
        """How many replies 200 come back for `count` NOOPs that are sent without waiting."""
        output, got = memoryview(b"NOOP\r\n" * count), b""
        client.sock.setblocking(False)
        replies = 0
        while replies < count:
            readable, writable, _ = select.select([client.sock], [client.sock] if output else [], [], EXAM_SECONDS)
            self.assertTrue(readable or writable, "%d replies, then silence" % replies)
            if writable:
                output = output[client.sock.send(output[:1 << 16]):]
            if readable:
                data = client.sock.recv(1 << 16)
                self.assertTrue(data, "closed after %d replies" % replies)
                *lines, got = (got + data).split(b"\n")
                replies += len(lines)
                self.assertEqual({line[:4] for line in lines} - {b"200 "}, set())
        client.sock.settimeout(EXAM_SECONDS)
        self.assertEqual(client.code("SYST"), 215)

    def test_a_hundred_thousand_commands_at_once(self):
        for user in (None, "alice"):
            with self.subTest(user=user):
                self.flood(self.client("-E", user=user), 100000)

    def test_a_login_and_what_follows_in_one_packet(self):
        client = self.client("-E", user=None)
        client.send(b"USER alice\r\nPASS secret\r\nPWD\r\n" + b"NOOP\r\n" * 500 + b"SYST\r\n")
        self.assertEqual([client.reply()[0] for _ in range(504)], [331, 230, 257] + [200] * 500 + [215])

    def test_a_wrong_login_and_what_follows_in_one_packet(self):
        if PROTOCOL_ORIGINAL:
            self.skipTest("delays")
        client = self.client("-E", user=None)
        client.send(b"USER alice\r\nPASS wrong\r\nNOOP\r\nPASS secret\r\nPWD\r\n")
        self.assertEqual([client.reply()[0] for _ in range(5)], [331, 530, 200, 230, 257])

    def test_sessions_per_user(self):
        if PROTOCOL_ORIGINAL:
            self.skipTest("needs a scoreboard")
        self.client("-E", user="once")
        client = self.client("-E", user=None)
        self.assertEqual((client.code("USER once"), client.code("PASS secret")), (331, 421))
        self.assertTrue(client.at_end())

    def test_minimum_uid(self):
        if not PROTOCOL_ORIGINAL:
            self.talk("USER alice -> 331\nPASS secret -> 530", "-E", "-u", str(EXAM_UID + 1), user=None)
            self.talk("PWD -> 257", "-E", "-u", str(EXAM_UID))


class ProtocolAnonymous(Exam):
    """Facts 4 and 6: who needs no password, and what they may do."""

    def anonymous(self, *switches, patches=""):
        if PROTOCOL_ORIGINAL and os.environ.get("FTP_HOME") != self.ftp:
            os.environ["FTP_HOME"] = self.ftp           # for a wrapper that makes a user ftp
        return self.client(*switches, user="ftp", patches=patches)

    def test_names(self):
        self.anonymous()
        for switches, name, code in (((), "ftp", 230), ((), "Anonymous", 230), ((), "", 230), ((), "alice", 331),
                                     (("-e",), "", 230),
                                     (("-e",), "alice", 230), (("-E",), "ftp", 331), (("-b",), "ftp", 331),
                                     (("-V", "127.0.0.9"), "alice", 230), (("-V", "127.0.0.1"), "alice", 331)):
            with self.subTest(switches=switches, name=name):
                client = self.client(*switches, user=None)
                self.assertEqual(client.code("USER " + name), code)
                if switches == ("-b",):
                    self.assertEqual(client.code("PASS x@y"), 230)
                if code == 230:
                    self.assertEqual(client.code("PWD"), 257)

    def test_saying_so_again_is_fine(self):
        client = self.anonymous()
        self.play(client, """
            PASS x@y       -> 230
            USER anonymous -> 230
            PASS           -> 230
            USER ftp       -> 230
            PWD            -> 257
        """)

    def test_what_they_may_do(self):
        self.put("old", b"old", base=self.ftp)
        self.put("empty", base=self.ftp)
        self.put("mine", b"mine", uid=EXAM_FTP_UID, base=self.ftp)
        self.make_dir("dir", uid=EXAM_FTP_UID, base=self.ftp)
        if ROOT:
            os.chmod(os.path.join(self.ftp, "empty"), 0o666)
        client = self.anonymous()
        self.play(client, """
            MKD new                      -> 550
            RMD dir                      -> 550
            DELE mine                    -> 550
            RNFR mine                    -> 550
            SITE CHMOD 600 mine          -> 550
            CHMOD 600 mine               -> 550
            SITE UTIME 20200101000000 mine -> 550
            MFMT 20200101000000 mine     -> 550
            SIZE mine                    -> 213 4
        """)
        with self.told(client):
            self.assertEqual(client.fetch("RETR mine")[::2], (226, b"mine"))
            self.assertEqual(client.store("STOR new", b"new")[0], 226)
            self.assertEqual(client.store("STOR empty", b"filled")[0], 226)
            self.assertEqual(client.store("STOR mine", b"x")[0], 550)
            self.assertEqual(client.store("APPE mine", b"x")[0], 550)
            self.assertEqual(client.store("STOR .dot", b"x")[0], 553)
            self.assertEqual(client.fetch("RETR .dot")[0], 553)
        self.assertEqual([self.content(name, self.ftp) for name in ("new", "empty", "mine")],
                         [b"new", b"filled", b"mine"])

    def test_a_refused_resume_deletes_nothing(self):
        self.put("mine", b"mine", uid=EXAM_FTP_UID, base=self.ftp)
        client = self.anonymous()
        client.say("REST 2")
        self.assertEqual(client.store("STOR mine", b"x")[0], 550)
        if not PROTOCOL_ORIGINAL:                                # facts 16
            self.assertEqual(self.content("mine", self.ftp), b"mine")

    def test_switches(self):
        self.put("mine", b"mine", uid=EXAM_FTP_UID, base=self.ftp)
        self.put(".dot", b"dot", base=self.ftp)
        with self.subTest("-M"):
            self.play(self.anonymous("-M"), "MKD new -> 257\nMKD new -> 550\nRMD new -> 550")
        with self.subTest("-i"):
            client = self.anonymous("-i")
            self.assertEqual(client.store("STOR file", b"x")[0], 550, client.exchange())
            self.assertFalse(os.path.exists(os.path.join(self.ftp, "file")))
        with self.subTest("-s"):
            client = self.anonymous("-s")
            self.assertEqual(client.fetch("RETR mine")[0], 550, client.exchange())
        with self.subTest("-z"):
            client = self.anonymous("-z")
            self.assertEqual(client.fetch("RETR .dot")[::2], (226, b"dot"), client.exchange())
            self.assertEqual(client.store("STOR .new", b"x")[0], 553, client.exchange())
        with self.subTest("-m"):
            if not PROTOCOL_ORIGINAL:
                client = self.anonymous("-m", "1", patches="os.getloadavg = lambda: (2.0, 2.0, 2.0)")
                self.assertEqual(client.fetch("RETR mine")[0], 550, client.exchange())


class ProtocolFiles(Exam):
    """Facts 5: commands about names."""

    def test_simple_answers(self):
        self.talk("""
            NOOP          -> 200
            ACCT          -> 202
            ACCT x        -> 202
            SYST          -> 215 L8
            HELP          -> 214
            SITE HELP     -> 214
            SITE          -> 500
            SITE X        -> 500
            SITE TIME     -> 211
            SITE IDLE     -> 501
            SITE IDLE x   -> 501
            SITE IDLE 10x -> 501
            SITE IDLE 2521 -> 501
            SITE IDLE 99999999999999999999 -> 501
            SITE IDLE 2520 -> 200
            SITE ALIAS    -> 214/*
            SITE ALIAS x  -> 502
            TYPE          -> 501
            TYPE L 9      -> 504/200
            MODE S        -> 200
            MODE B        -> 504
            MODE          -> 501
            STRU F        -> 200
            STRU R        -> 504
            STRU          -> 501
            OPTS UTF8 ON  -> 200/504
            OPTS XYZZY    -> 504
            OPTS MLST type;size; -> 200
            REIN          -> 500
            SMNT x        -> 500
            SPSV          -> 500
            LANG          -> 500
            HOST x        -> 500
            XYZZY         -> 500
            CLNT x        -> 200/500
            STAT          -> 211
            ABOR          -> 226
            PBSZ 0        -> 503
            PROT P        -> 503
            AUTH SSL      -> 502/500
            QUIT          -> 221
        """)

    def test_features_are_what_works(self):
        def features(*switches):
            code, text = self.client(*switches).say("FEAT")
            self.assertEqual(code, 211)
            first, *lines, last = text.decode().split("\r\n")[:-1]
            self.assertTrue(first.startswith("211-") and last.startswith("211 "), text)
            return {line.strip() for line in lines}

        got = features()
        wanted = {"UTF8", "EPRT", "MDTM", "SIZE", "MFMT", "REST STREAM", "MLSD", "PRET", "TVFS", "ESTA", "PASV",
                  "EPSV", "ESTP",
                  "MLST type*;size*;sizd*;modify*;UNIX.mode*;UNIX.uid*;UNIX.gid*;unique*;"}
        self.assertEqual(wanted - got, set())
        if not PROTOCOL_ORIGINAL:
            self.assertFalse({"AUTH TLS", "PBSZ", "PROT"} & got)
        self.assertFalse({"PASV", "EPSV", "ESTP"} & features("-N"))
        self.assertEqual({"PASV", "EPSV", "ESTP"} & features("-P", "127.0.0.1"), {"PASV", "EPSV"})

    def test_directories(self):
        self.make_dir("sub")
        self.make_dir("sub/below")
        self.make_dir(".dot")
        self.put("file", b"x")
        os.symlink("sub/below", os.path.join(self.home, "link"))
        self.talk("""
            PWD            -> 257 "/"
            XPWD           -> 257 "/"
            CWD sub        -> 250
            CWD below/     -> 250
            PWD            -> 257 "/sub/below"
            CDUP           -> 250
            XCUP           -> 250
            CDUP           -> 250
            CDUP           -> 250
            PWD            -> 257 "/"
            CWD missing    -> 550
            CWD file       -> 550
            CWD /sub       -> 250
            CWD            -> 250
            PWD            -> 257 "/"
            CWD ~/sub      -> 250
            PWD            -> 257 "/sub"
            CWD ~          -> 250
            PWD            -> 257 "/"
            XCWD link      -> 250
            PWD            -> 257 "/sub/below"
            CWD ~root      -> 550
            CWD ..         -> 250
            CWD ../../../../.. -> 250
            PWD            -> 257 "/"
            CWD .dot       -> 250
            MKD            -> 501
            RMD            -> 550
            MKD new        -> 257 "/.dot/new"
            XMKD new       -> 550
            MKD /missing/x -> 550
            CWD new        -> 250
            MKD ../quo"te  -> 257 "/.dot/quo""te"
            CWD ../quo"te  -> 250
            PWD            -> 257 "/.dot/quo""te"
            CWD /          -> 250
            RMD .dot       -> 550
            RMD .dot/new   -> 250
            XRMD .dot/quo"te -> 250
            RMD .dot/quo"te -> 550
            RMD file       -> 550
            RMD link       -> 550
        """)
        self.assertFalse(os.path.exists(os.path.join(self.home, ".dot/new")))

    def test_a_directory_that_goes_away_while_one_is_in_it(self):
        path = self.make_dir("sub")
        client = self.client()
        self.assertEqual(client.code("CWD sub"), 250)
        os.rmdir(path)
        self.play(client, """
            NOOP      -> 200
            SIZE x    -> 550
            MKD x     -> 550
            CWD x     -> 550
            PWD       -> 257/*
            CWD /     -> 250
            PWD       -> 257 "/"
        """)

    def test_fifty_failures_in_a_row(self):
        if PROTOCOL_ORIGINAL:
            self.skipTest("two minutes of delays")
        client = self.client()
        self.assertEqual({client.code("CWD missing") for _ in range(49)}, {550})
        self.assertEqual(client.code("CWD /"), 250)
        self.assertEqual({client.code("CWD missing") for _ in range(50)}, {550})
        self.assertEqual(client.code("CWD missing"), 421)
        self.assertTrue(client.at_end())

    def test_delete_and_rename(self):
        self.make_dir("sub")
        for name in ("one", "two", "three"):
            self.put(name, name.encode())
        os.symlink("two", os.path.join(self.home, "link"))
        os.symlink("nowhere", os.path.join(self.home, "dangling"))
        self.talk("""
            DELE           -> 501
            DELE sub       -> 550
            DELE missing   -> 550
            DELE link      -> 250
            DELE one       -> 250
            SIZE two       -> 213 3
            RNFR           -> 550
            RNFR missing   -> 550
            RNTO x         -> 503
            RNFR two       -> 350
            RNTO           -> 550
            RNTO sub/two   -> 250
            RNTO again     -> 503
            RNFR dangling  -> 350
            RNFR three     -> 350
            RNTO /missing/x -> 550/451
            RNTO three     -> 503
            RNFR dangling  -> 350
            RNTO dangling2 -> 250
            RNFR three     -> 350
            CWD sub        -> 250
            RNTO two       -> 250/451
            SIZE two       -> 213/* 5
            RNFR /sub/two  -> 350/*
            RNTO /sub      -> 550/*
        """)
        self.assertEqual(os.readlink(os.path.join(self.home, "dangling2")), "nowhere")

    def test_size_and_times(self):
        path = self.put("file", b"x\n" * 50)
        self.put("name with spaces", b"x")
        self.put(".dot", b"x")
        self.make_dir("sub")
        os.symlink("file", os.path.join(self.home, "link"))
        os.symlink("nowhere", os.path.join(self.home, "dangling"))
        os.utime(path, (1e9, 1e9))
        self.talk("""
            SIZE           -> 501
            SIZE missing   -> 550
            SIZE sub       -> 550
            SIZE link      -> 213 100
            SIZE dangling  -> 550
            TYPE A         -> 200
            SIZE file      -> 213 100
            SIZE .dot      -> 213 1
            MDTM           -> 501
            MDTM file      -> 213 20010909014640
            MDTM sub       -> 550
            MDTM missing   -> 550
            MFMT           -> 501
            MFMT 20200229123456 -> 501
            MFMT 20200229123456 file -> 213
            MDTM file      -> 213 20200229123456
            MFMT 20200229123457 link -> 213
            MDTM file      -> 213 20200229123457
            MFMT 20200229123456 sub  -> 213
            MFMT 20200229123456 missing -> 550
            MFMT x file    -> 501
            MFMT 20200101 file  -> 501/213
            MFMT 20201301000000 file -> 501/213
            MFMT 20210229000000 file -> 501/213
            MFMT 20200101250000 file -> 501/213
            MFMT 99999999999999999999 file -> 501/*
            MFMT 19011213204500 file -> 213/*
            MFMT 20200101000000 name with spaces -> 213
            MDTM name with spaces -> 213 20200101000000
            SITE UTIME     -> 501
            SITE UTIME 20200101000000 -> 501
            SITE UTIME 20200101000001 file -> 213
            MDTM file      -> 213 20200101000001
            SITE UTIME file 20210101000000 20220101000000 20230101000000 UTC -> 213
            MDTM file      -> 213 20210101000000
            SITE UTIME file 20210101000000 20220101000000 UTC -> 501
            SITE UTIME 20210101000000 missing -> 550
        """)

    def test_permissions(self):
        path = self.put("file", b"x")
        self.make_dir("sub")
        self.talk("""
            SITE CHMOD          -> 501
            SITE CHMOD 600      -> 550
            SITE CHMOD 600 file -> 200
            SITE CHMOD 4755 sub -> 200
            CHMOD 640 file      -> 200
            SITE CHMOD 640 missing -> 550
            SITE CHMOD 640  file -> 550/200
            SITE CHMOD 10000 file -> 501
            SITE CHMOD 778 file -> 501/*
            SITE CHMOD abc file -> 501/*
            SITE CHMOD 99999999999999999999 file -> 501/550
            CHMOD               -> 501
            SITE CHMOD 640 file -> 200/*
            SITE CHMOD 0 /      -> 200
            CWD sub             -> 250
            CWD /               -> 250
        """)
        if not PROTOCOL_ORIGINAL:
            self.assertEqual(stat.S_IMODE(os.stat(path).st_mode), 0o640)
        self.assertEqual(stat.S_IMODE(os.stat(self.home).st_mode), 0o700)
        self.assertEqual(stat.S_IMODE(os.stat(os.path.join(self.home, "sub")).st_mode), 0o4755)

    def test_room(self):
        self.talk("""
            ALLO          -> 501
            ALLO 0        -> 200
            ALLO 100      -> 200
            ALLO 100 R 80 -> 200/*
            ALLO -1       -> 501
            ALLO x        -> 501/*
            ALLO 9223372036854775807 -> 552
            ALLO 99999999999999999999999 -> 552/*
            ALLO ١٢  -> 501/*
        """)

    def test_offsets(self):
        self.talk("""
            REST          -> 501
            REST x        -> 554
            REST -1       -> 554
            REST 10       -> 350
            REST 9223372036854775807  -> 350
            REST 9223372036854775808  -> 554
            REST 99999999999999999999999999 -> 554
            REST ١٢   -> 554
            REST 1²  -> 554
            REST 0        -> 350
        """)

    def test_facts(self):
        self.put("file", b"12345", base=self.home)
        os.chmod(os.path.join(self.home, "file"), 0o644)
        client = self.talk("""
            MLST file     -> 250 UNIX.mode=0644
            MLST missing  -> 550
            MLST          -> 250 type=
        """)
        code, text = client.say("MLST file")
        begin, line, end = text.split(b"\r\n")[:-1]
        self.assertTrue(begin.startswith(b"250-") and end.startswith(b"250 "), text)
        self.assertRegex(line,
                         rb"^ type=file;size=5;modify=\d{14};UNIX.mode=0644;UNIX.uid=\d+;UNIX.gid=\d+;"
                         rb"unique=\w+; /?file$")
        if not PROTOCOL_ORIGINAL:
            self.play(client, "OPTS MLST type;size; -> 200 MLST OPTS type;size;\nMLST file -> 250  type=file;size=5; ")
            self.play(client,
                      "OPTS MLST -> 200 MLST OPTS\nOPTS MLST bogus;SIZE; -> 200 MLST OPTS size;\n"
                      "MLST file -> 250  size=5; ")
            self.assertIn(" MLST type;size*;sizd;", client.say("FEAT")[1].decode())


class Transfers(Exam):
    """Facts 6: data connections."""

    def test_there_and_back(self):
        for size in (0, 1, 4096, 4097, 300000, 3 << 20):
            with self.subTest(size=size):
                content = os.urandom(size)
                client = self.client()
                self.assertEqual(client.store("STOR file", content)[0], 226, client.exchange())
                self.assertEqual(self.content("file"), content)
                code, text, got = client.fetch("RETR file")
                self.assertEqual((code, got == content), (226, True), client.exchange())

    def test_150_tells_the_size(self):
        self.put("file", b"x" * 4097)
        client = self.client()
        data = client.passive()
        self.addCleanup(data.close)
        self.assertRegex(client.say("RETR file")[1].decode(), r"(?s)^150-.*\r\n150 4\.0 kbytes to download")

    def test_without_a_data_connection(self):
        self.put("file", b"content")
        self.talk("""
            RETR          -> 501
            STOR          -> 501
            APPE          -> 501
            RETR missing  -> 550
            RETR file     -> 425
            STOR file     -> 425
            APPE file     -> 425
            STOR new      -> 425
            STOU          -> 425
            LIST          -> 425
            NLST          -> 425
            MLSD          -> 425
        """)
        if not PROTOCOL_ORIGINAL:                                # its STOR has emptied the file
            self.assertEqual(os.listdir(self.home), ["file"])
            self.assertEqual(self.content("file"), b"content")

    def test_resumed_downloads(self):
        self.put("file", b"0123456789")
        for offset, code, wanted in ((3, 226, b"3456789"), (10, 226, b""), (11, 554, b""), (1 << 62, 554, b""),
                                     (0, 226, b"0123456789")):
            with self.subTest(offset=offset):
                client = self.client()
                data = client.passive()
                self.play(client, "REST %d -> 350\nPWD -> 257\nNOOP -> 200" % offset)
                self.assertEqual(client.fetch("RETR file", data)[::2], (code, wanted), client.exchange())
                self.assertEqual(client.fetch("RETR file")[::2], (226, b"0123456789"),
                                 client.exchange())      # it is used up

    def test_resumed_uploads(self):
        for offset, code, wanted in ((4, 226, b"0123xy"), (10, 226, b"0123456789xy"), (0, 226, b"xy"),
                                     (11, 554, b"0123456789")):
            with self.subTest(offset=offset):
                self.put("file", b"0123456789")
                client = self.client()
                client.say("REST %d" % offset)
                result = client.store("STOR file", b"xy")[0]
                if not (PROTOCOL_ORIGINAL and code == 554):
                    self.assertEqual(result, code, client.exchange())
                    self.assertEqual(self.content("file"), wanted)

    def test_resume_of_what_is_not_there(self):
        client = self.client()
        client.say("REST 5")
        code = client.store("STOR new", b"xy")[0]
        if not PROTOCOL_ORIGINAL:
            self.assertEqual(code, 554)
            self.assertEqual(os.listdir(self.home), [])

    def test_offsets_are_used_up_by_failures(self):
        self.put("file", b"0123456789")
        client = self.client()
        self.play(client, "REST 5 -> 350\nRETR missing -> 550\nTYPE A -> 200\nREST 5 -> 350")
        for command in ("RETR file", "STOR file", "APPE file"):
            with self.told(client):
                client.say("REST 5")
                self.assertEqual(client.fetch(command)[0], 503)
        self.assertEqual(self.content("file"), b"0123456789")
        self.assertEqual(client.fetch("RETR file")[::2], (226, b"0123456789"), client.exchange())

    def test_append(self):
        client = self.client()
        for offset, wanted in ((0, b"ab"), (0, b"abab"), (1, b"ababab"), (3, b"abababab")):
            client.say("REST %d" % offset)
            self.assertEqual(client.store("APPE file", b"ab")[0], 226, client.exchange())
            self.assertEqual(self.content("file"), wanted)

    def test_unique_names(self):
        client = self.client()
        names = set()
        for content in (b"one", b"two"):
            with client.passive() as data:
                code, text = client.say("STOU ignored")
                self.assertEqual(code, 150)
                name = re.search(rb"FILE: (pureftpd\.[0-9a-f]{8}\.[0-9a-f]{2}\.[0-9a-f]{4})\r\n", text).group(1)
                data.sendall(content)
            self.assertEqual(client.reply()[0], 226)
            self.assertEqual(self.content(name), content)
            names.add(name)
        self.assertEqual(set(os.listdir(os.fsencode(self.home))), names)

    def test_text(self):
        for stored, sent in ((b"a\nb\n", b"a\r\nb\r\n"), (b"\n\n", b"\r\n\r\n"), (b"a\rb", b"a\rb"), (b"a\r", b"a\r"),
                             (b"", b""),
                             (b"a\r\nb", b"a\r\nb"), (b"a\r\r\n", b"a\r\r\n"),
                             (b"x" * 262143 + b"\r\n" + b"y" * 300000 + b"\n",
                              b"x" * 262143 + b"\r\n" + b"y" * 300000 + b"\r\n")):
            if PROTOCOL_ORIGINAL and b"\r\n" in stored:
                continue                                # Compat: it sends CR CR LF
            with self.subTest(stored[:10]):
                self.put("file", stored)
                client = self.client()
                client.say("TYPE A")
                self.assertEqual(client.fetch("RETR file")[::2], (226, sent), client.exchange())
        for sent, stored in ((b"a\r\nb\r\n", b"a\nb\n"), (b"a\nb", b"a\nb"), (b"a\rb\r", b"ab"), (b"", b""),
                             (b"line\r\n" * 100000, b"line\n" * 100000)):
            with self.subTest(sent[:10]):
                client = self.client()
                client.say("TYPE A")
                self.assertEqual(client.store("STOR file", sent)[0], 226, client.exchange())
                self.assertEqual(self.content("file"), stored)

    def test_active(self):
        content = os.urandom(100000)
        client = self.client()
        for command in ("PORT", "EPRT"):
            with self.told(client):
                for verb in ("STOR file", "RETR file"):
                    with client.active(command) as listener:
                        self.assertEqual(client.code(verb), 150)
                        data, (_, port) = listener.accept()
                        with deadline_socket(data):
                            if ROOT and not PROTOCOL_ORIGINAL:
                                self.assertIn(port, pureftpd.DATA_PORTS)
                            if verb == "STOR file":
                                data.sendall(content)
                                data.close()
                            else:
                                self.assertEqual(b"".join(iter(lambda data=data: data.recv(1 << 20), b"")), content)
                        self.assertEqual(client.reply()[0], 226)
                self.assertEqual(client.code("RETR file"), 425)         # one use

    def test_active_to_nobody(self):
        self.put("file", b"content")
        client = self.client()
        client.active().close()
        self.assertEqual(client.code("RETR file"), 425)
        client.active().close()
        self.assertEqual(client.code("STOR file"), 425)
        if not PROTOCOL_ORIGINAL:
            self.assertEqual(self.content("file"), b"content")
        self.assertEqual(client.code("NOOP"), 200)

    def test_no_bounce(self):
        self.talk("""
            PORT                       -> 501
            PORT 1,2,3                 -> 501
            PORT 127,0,0,1,1,2,3       -> 501
            PORT 127,0,0,1,256,2       -> 501
            PORT 127,0,0,1,-1,2        -> 501
            PORT 127,0,0,1,3,255       -> 501
            PORT 127,0,0,1,0,0         -> 501
            PORT 127,0,0,1,0,80        -> 501
            PORT 0,0,0,0,40,40         -> 501
            PORT 127,0,0,2,40,40       -> 500
            PORT 10,0,0,1,40,40        -> 500
            PORT 127,0,0,1,40,40       -> 200
            EPRT                       -> 501
            EPRT |1|127.0.0.1|         -> 501
            EPRT |1|127.0.0.1|70000|   -> 501
            EPRT |1|127.0.0.1|x|       -> 501
            EPRT |1|127.0.0.1|80|      -> 501
            EPRT |1|10.0.0.1|4000|     -> 500
            EPRT |1|127.0.0.1.1|4000|  -> 501/200
            EPRT |2|127.0.0.1|4000|    -> 501
            EPRT |2|::1|4000|          -> 500/*
            EPRT |3|127.0.0.1|4000|    -> 522
            EPRT !1!127.0.0.1!4000!    -> 200
            EPRT |1|127,0,0,1|4000|    -> 200
            PORT 127,0,0,2,40,40       -> 500
            LIST                       -> 425
        """)

    def test_fxp(self):
        for switches, user, code in ((("-w",), "alice", 200), (("-w",), "ftp", 500), (("-W",), "alice", 200),
                                     (("-W",), "ftp", 200)):
            if PROTOCOL_ORIGINAL and user == "ftp":
                continue
            with self.subTest(switches=switches, user=user):
                client = self.client(*switches, user=user)
                self.play(client, "PORT 127,0,0,2,40,40 -> %d\nPORT 127,0,0,2,0,80 -> 501" % code)

    def test_fxp_between_two_servers(self):
        content = os.urandom(50000)
        self.put("file", content)
        one, two = self.client("-W"), self.client("-W")
        address = re.search(rb"\(([\d,]+)\)", one.say("PASV")[1]).group(1)
        self.assertEqual(two.code(b"PORT " + address), 200)
        two.send(b"RETR file\r\n")
        self.assertEqual(one.code("STOR copy"), 150)
        self.assertEqual((two.reply()[0], two.reply()[0], one.reply()[0]), (150, 226, 226))
        self.assertEqual(self.content("copy"), content)

    def test_foreign_data_connections(self):
        self.put("file", b"secret")
        client = self.client()
        port = int(re.search(rb"\|(\d+)\|", client.say("EPSV")[1]).group(1))
        with socket.create_connection(("127.0.0.1", port), EXAM_SECONDS, ("127.0.0.2", 0)) as thief:
            client.send(b"RETR file\r\n")
            thief.settimeout(EXAM_SECONDS)
            with contextlib.suppress(ConnectionResetError):
                self.assertEqual(thief.recv(10), b"")
            with deadline_socket(socket.create_connection(("127.0.0.1", port), EXAM_SECONDS)) as data:
                self.assertEqual(client.reply()[0], 150)
                self.assertEqual(data.recv(10), b"secret")
        self.assertEqual(client.reply()[0], 226)

    def test_passive_sockets_survive(self):
        self.put("file", b"content")
        client = self.client()
        with client.passive("PASV") as data:
            address = data.getpeername()
            self.assertEqual(client.fetch("RETR file", data)[::2], (226, b"content"))
        self.assertEqual(client.fetch("RETR file", deadline_socket(socket.create_connection(address)))[::2],
                         (226, b"content"))
        self.assertEqual(client.fetch("LIST", deadline_socket(socket.create_connection(address)))[0], 226)

    def test_kinds_of_passive(self):
        self.talk("""
            PASV     -> 227
            P@SW     -> 227
            EPSV     -> 229
            EPSV 1   -> 229
            EPSV 2   -> 522/229
            EPSV 3   -> 522/229
            ESTA     -> 520
            EPSV ALL -> 220
            PORT 127,0,0,1,40,40 -> 501
            EPRT |1|127.0.0.1|4000| -> 501
            PASV     -> 501/227
            EPSV     -> 229
        """)
        self.talk("PASV -> 500\nEPSV -> 500", "-N")
        self.talk("PASV -> 227\nEPSV -> 500", "-b")
        self.talk("PASV -> 227 (192,0,2,7,\nEPSV -> 229", "-P", "192.0.2.7")

    @unittest.skipIf(PROTOCOL_ORIGINAL, "answers, then waits")
    def test_established_beforehand(self):
        self.put("file", b"content")
        client = self.client()
        self.play(client, "ESTA -> 520\nESTP -> 520")
        with client.passive() as data:
            self.assertEqual(client.code("ESTP"), 225)
            self.assertEqual(client.fetch("RETR file", data)[::2], (226, b"content"))
        with client.active() as listener:
            self.assertEqual(client.code("ESTA"), 225)
            self.assertEqual(client.fetch("RETR file", listener.accept()[0])[::2], (226, b"content"))

    def test_abort_while_nobody_comes(self):
        if PROTOCOL_ORIGINAL:
            self.skipTest("does not listen then")
        self.put("file", b"content")
        client = self.client()
        for command in ("ESTP", "RETR file", "STOR file", "LIST", "STOR new"):
            with self.told(client):
                self.assertEqual(client.code("EPSV"), 229)
                client.send(command.encode() + b"\r\nABOR\r\n")
                self.assertEqual((client.reply()[0], client.reply()[0]), (426, 226))
        self.assertEqual((os.listdir(self.home), self.content("file")), (["file"], b"content"))
        self.assertEqual(client.code("NOOP"), 200)

    def test_nobody_comes(self):
        if PROTOCOL_ORIGINAL:
            self.skipTest("its session ends")
        self.put("file", b"content")
        client = self.client(patches="pureftpd.ACCEPT_SECONDS = 0.1")
        self.play(client, "EPSV -> 229\nRETR file -> 425\nSTOR file -> 425\nESTP -> 425\nPWD -> 257")
        self.assertEqual(self.content("file"), b"content")

    def test_wishes(self):
        self.put("file", b"content")
        self.make_dir("sub")
        self.talk("""
            PRET              -> 200
            PRET RETR file    -> 200
            PRET RETR missing -> 550
            PRET RETR sub     -> 550
            PRET STOR x       -> 200
            PRET LIST         -> 200
            PRET XYZZY        -> 200
        """)

    @unittest.skipIf(PROTOCOL_ORIGINAL, "another network")
    def test_ipv6(self):
        try:
            socket.create_server(("::1", 0), family=socket.AF_INET6).close()
        except OSError:
            self.skipTest("no IPv6 here")
        self.put("file", b"content")
        daemon = self.server("-S", "::1,0")
        port = int(daemon.wait_for(r"Listening on ::1 port (\d+)").group(1))
        client = ExamClient(deadline_socket(socket.create_connection(("::1", port))))
        self.addCleanup(client.close)
        self.assertEqual(client.reply()[0], 220)
        self.play(client, """
            USER alice  -> 331
            PASS secret -> 230
            PASV        -> 425
            EPSV 1      -> 522
            EPSV 2      -> 229
            EPRT |1|127.0.0.1|4000| -> 500
            EPRT |2|::2|4000|       -> 500
            EPRT |2|::1|80|         -> 501
            EPRT |2|::|4000|        -> 501
            EPRT |2|x|4000|         -> 501
            PORT 127,0,0,1,40,40    -> 500
            STAT        -> 211 ::1
        """)
        with self.told(client):
            self.assertEqual(client.fetch("RETR file")[::2], (226, b"content"))
            with deadline_socket(socket.create_server(("::1", 0), family=socket.AF_INET6)) as listener:
                self.assertEqual(client.code("EPRT |2|::1|%d|" % listener.getsockname()[1]), 200)
                self.assertEqual(client.code("RETR file"), 150)
                with listener.accept()[0] as data:
                    self.assertEqual(deadline_socket(data).recv(100), b"content")
            self.assertEqual(client.reply()[0], 226)

    @unittest.skipIf(PROTOCOL_ORIGINAL, "another code")
    def test_transfers_that_stand_still_end(self):
        down, up = self.client(), self.client()
        for client in (down, up):
            self.assertEqual(client.code("SITE IDLE 1"), 200)
        with self.big(down), up.passive() as data:
            self.assertEqual(up.code("STOR file"), 150)
            data.sendall(b"some")
            self.assertEqual((up.reply()[0], down.reply()[0]), (426, 426))
        self.assertEqual(self.content("file"), b"some")
        self.assertEqual((up.code("NOOP"), down.code("NOOP")), (200, 200))

    # -- while a transfer is under way ---------------------------------------------------------------

    def big(self, client, command="RETR big"):
        """A download that waits for us to read."""
        path = self.put("big", b"")
        os.truncate(path, 64 << 20)
        data = client.passive()
        self.addCleanup(data.close)
        self.assertEqual(client.code(command), 150, client.exchange())
        return data

    def test_abort_of_a_download(self):
        for line in (b"ABOR\r\n", b"abor\r\n", b"\xff\xf4\xff\xf2ABOR\r\n")[:2 if PROTOCOL_ORIGINAL else 3]:
            with self.subTest(line):
                client = self.client()
                with self.big(client) as data:
                    if PROTOCOL_ORIGINAL:
                        data.recv(1 << 20)
                    client.send(line)
                    if PROTOCOL_ORIGINAL:
                        data.close()
                    self.assertEqual((client.reply()[0], client.reply()[0]), (150 if PROTOCOL_ORIGINAL else 426, 226),
                                     client.exchange())
                self.assertEqual(client.code("NOOP"), 200)

    def test_abort_with_synch(self):
        client = self.client()
        with self.big(client):
            client.sock.sendall(b"\xff\xf4\xff")
            client.sock.send(b"\xf2", socket.MSG_OOB)
            client.send(b"ABOR\r\n")
            if not PROTOCOL_ORIGINAL:
                self.assertEqual((client.reply()[0], client.reply()[0]), (426, 226), client.exchange())
        if not PROTOCOL_ORIGINAL:
            self.assertEqual(client.code("NOOP"), 200)

    def test_abort_with_synch_when_idle(self):
        if PROTOCOL_ORIGINAL:
            self.skipTest("says nothing")
        for user in ("alice", None):
            client = self.client("-E", user=user)
            client.sock.send(b"\xff\xf4\xff\xf2", socket.MSG_OOB)
            client.send(b"ABOR\r\n")
            self.assertEqual(client.reply()[0], 226 if user else 530)
            self.assertEqual(client.code("NOOP"), 200)

    def test_abort_of_an_upload(self):
        client = self.client()
        with client.passive() as data:
            self.assertEqual(client.code("STOR file"), 150)
            data.sendall(b"x" * 1000)
            self.wait_for_size("file", 1000)
            client.send(b"ABOR\r\n")
            self.assertEqual((client.reply()[0], client.reply()[0]), (426, 451), client.exchange())
        self.assertEqual(self.content("file"), b"x" * 1000)
        self.assertEqual(client.code("NOOP"), 200)

    def wait_for_size(self, name, size):
        limit = time.monotonic() + EXAM_SECONDS
        while os.stat(os.path.join(self.home, name)).st_size != size:
            self.assertLess(time.monotonic(), limit)
            select.select([], [], [], 0.002)

    def test_abort_of_an_upload_that_never_pauses(self):
        for kind in "AI":
            with self.subTest(kind):
                client = self.client()
                client.say("TYPE " + kind)
                with client.passive() as data:
                    self.assertEqual(client.code("STOR file"), 150)
                    block, sent = b"x" * (1 << 18), 0
                    data.setblocking(False)
                    client.sock.setblocking(False)
                    got = b""
                    limit = time.monotonic() + EXAM_SECONDS
                    while not got and time.monotonic() < limit:
                        readable, _, _ = select.select([client.sock], [data], [], EXAM_SECONDS)
                        if readable:
                            got = client.sock.recv(3)
                        with contextlib.suppress(BlockingIOError, ConnectionError):
                            sent += data.send(block)
                        if sent > 1 << 20:
                            sent = -1 << 60
                            client.send(b"ABOR\r\n")
                    self.assertEqual(got, b"426")

    def test_status_of_a_transfer(self):
        if PROTOCOL_ORIGINAL:
            self.skipTest("500")
        client = self.client()
        with self.big(client) as data:
            for _ in range(3):
                self.assertEqual(client.code("STAT"), 213)
            while data.recv(1 << 20):
                pass
            self.assertEqual(client.reply()[0], 226)

    def test_other_commands_wait_for_the_end_of_a_transfer(self):
        if PROTOCOL_ORIGINAL:
            self.skipTest("500")
        for count in (3, 5000):
            with self.subTest(count):
                client = self.client()
                with self.big(client) as data:
                    client.send(b"NOOP\r\n" * count)
                    while data.recv(1 << 20):
                        pass
                    self.assertEqual(client.reply()[0], 226)
                    self.assertEqual({client.reply()[0] for _ in range(count)}, {200})
                self.assertEqual(client.code("SYST"), 215)

    def test_goodbye_waits_for_the_end_of_a_transfer(self):
        if PROTOCOL_ORIGINAL:
            self.skipTest("like ABOR, or one reply")
        client = self.client()
        with self.big(client) as data:
            client.send(b"QUIT\r\n")
            self.assertEqual(sum(iter(lambda: len(data.recv(1 << 20)), 0)), 64 << 20)
        self.assertEqual((client.reply()[0], client.reply()[0]), (226, 221))
        self.assertTrue(client.at_end())

    def test_transfers_in_one_packet(self):
        self.put("file", b"content")
        client = self.client()
        with client.passive() as data:
            address = data.getpeername()
            with socket.create_connection(address) as second:
                client.send(b"RETR file\r\nSTAT\r\nPWD\r\nRETR file\r\nSIZE file\r\n")
                if PROTOCOL_ORIGINAL:
                    return
                codes = [client.reply()[0] for _ in range(7)]
                self.assertIn(codes, ([150, 226, 211, 257, 150, 226, 213], [150, 213, 226, 257, 150, 226, 213]))
                self.assertEqual((data.recv(100), second.recv(100)), (b"content", b"content"))

    def test_the_client_cuts_a_download(self):
        if PROTOCOL_ORIGINAL:
            self.skipTest("150 again")
        client = self.client()
        data = self.big(client)
        data.close()
        self.assertEqual(client.reply()[0], 426)
        self.assertEqual(client.code("NOOP"), 200)

    def test_the_client_resets_an_upload(self):
        client = self.client()
        data = client.passive()
        self.assertEqual(client.code("STOR file"), 150)
        data.sendall(b"x" * 1000)
        self.wait_for_size("file", 1000)
        data.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        data.close()
        self.assertIn(client.reply()[0], (426, 451) if not PROTOCOL_ORIGINAL else (226, 426, 451))
        self.assertEqual(client.code("NOOP"), 200)

    def test_two_sessions_do_not_write_one_file(self):
        if PROTOCOL_ORIGINAL:
            self.skipTest("they do")
        one, two = self.client(user="quota"), self.client(user="quota")
        with one.passive() as data:
            self.assertEqual(one.code("STOR file"), 150)
            self.assertEqual(two.store("STOR file", b"other")[0], 450)
            data.sendall(b"mine")
        self.assertEqual(one.reply()[0], 226)
        self.assertEqual(self.content("file", os.path.join(self.place, "quota")), b"mine")

    def test_a_port_range_that_is_used_up(self):
        pair = []
        while len(pair) < 2:
            pair = [socket.create_server(("127.0.0.1", 0))]
            first = pair[0].getsockname()[1]
            with contextlib.suppress(OSError, OverflowError):
                pair.append(socket.create_server(("127.0.0.1", first + 1)))
            for sock in pair:
                self.addCleanup(sock.close)
        client = self.client("-p", "%d:%d" % (first, first + 1))
        with pair[0], pair[1]:
            self.play(client, "EPSV -> 425\nPASV -> 425\nLIST -> 425")
        ports = {int(re.search(rb"\|(\d+)\|", client.say("EPSV")[1]).group(1)) for _ in range(20)}
        self.assertEqual(ports, {first, first + 1})
        self.put("file", b"content")
        self.assertEqual(client.fetch("RETR file")[::2], (226, b"content"))


class Names(Exam):
    """Facts 7: names are bytes, and stay where they belong."""

    def test_a_file_that_becomes_shorter_while_it_is_sent(self):
        for kind in "IA":
            with self.subTest(kind):
                path = self.put("file")
                os.truncate(path, 64 << 20)
                client = self.client()
                self.assertEqual(client.code("TYPE " + kind), 200)
                with client.passive() as data:
                    self.assertEqual(client.code("RETR file"), 150)
                    data.recv(1000)
                    os.truncate(path, 32 << 20)
                    while data.recv(1 << 20):
                        pass
                self.assertEqual(client.reply()[0], 451, client.exchange())

    def test_an_offset_is_for_the_next_transfer_whatever_that_is(self):
        self.put("file", b"0123456789")
        client = self.client()
        for command in ("NLST", "ABOR"):
            self.assertEqual(client.code("REST 5"), 350)
            self.assertEqual(client.fetch(command)[0] if command == "NLST" else client.code(command), 226)
            self.assertEqual(client.fetch("RETR file")[2], b"0123456789")

    def test_bytes_from_end_to_end(self):
        names = [b"caf\xc3\xa9", b"caf\xe9", bytes(range(128, 192)), bytes(range(192, 256)), b"a b", b"quo\"te",
                 b"a'b;c|d&e$f`g",
                 b"-l", b"*", b"[a]", b"~tilde", b"per%cent", b"#", b"...x"]
        if not PROTOCOL_ORIGINAL:
            names += [b" lead", b"trail ", b"back\\slash", b"  "]
        client = self.client()
        for name in names:
            with self.subTest(name), self.told(client):
                self.assertEqual(client.store(b"STOR " + name, b"content of " + name)[0], 226)
                self.assertEqual(self.content(name), b"content of " + name)
                self.assertIn(name, client.fetch("NLST")[2].split(b"\r\n"))
                self.assertIn(b"; " + name + b"\r\n", client.fetch("MLSD")[2])
                self.assertEqual(client.fetch(b"RETR " + name)[::2], (226, b"content of " + name))
                self.assertEqual(client.code(b"RNFR " + name), 350)
                self.assertEqual(client.code(b"RNTO " + name + b"x"), 250)
                self.assertEqual(client.code(b"SIZE " + name + b"x"), 213)
                self.assertEqual(client.code(b"DELE " + name + b"x"), 250)
                self.assertEqual(client.code(b"MKD " + name), 257)
                self.assertEqual(client.code(b"CWD " + (b"./" if name[:1] == b"~" else b"") + name), 250)
                self.assertIn(name.replace(b'"', b'""') if not PROTOCOL_ORIGINAL else b"", client.say("PWD")[1])
                self.assertEqual(client.code("CWD /"), 250)
                self.assertEqual(client.code(b"RMD " + name), 250)
        self.assertEqual(os.listdir(self.home), [])

    def test_control_bytes_reach_no_name(self):
        if PROTOCOL_ORIGINAL:
            self.skipTest("553")
        client = self.client()
        for name in (b"a\rb", b"a\0b", b"a\tb", b"a\x7fb", b"a\x1bb"):
            with self.subTest(name):
                self.assertEqual(client.store(b"STOR " + name, b"x")[0], 226, client.exchange())
                self.assertEqual(os.listdir(self.home), ["a_b"])
                self.assertEqual(client.code(b"DELE " + name), 250)

    def test_what_a_reply_shows_cannot_forge_one(self):
        self.make_dir(b"evil\n230 forged")
        self.put(b"evil\n230 forged/file", b"x")
        os.symlink(b"evil\n230 forged", os.path.join(os.fsencode(self.home), b"link"))
        client = self.client()
        for command in ("CWD link", "PWD", "MKD sub", "MLST file", "STAT", "CWD missing", "CWD /"):
            with self.subTest(command):
                self.assertNotIn(b"\n230", client.say(command)[1])
                self.assertEqual(client.code("NOOP"), 200, client.exchange())

    @unittest.skipIf(PROTOCOL_ORIGINAL, "it can")
    def test_a_listing_in_a_reply_cannot_end_it(self):
        self.make_dir("213 dir")
        self.put("213 dir/file")
        self.put("213 End.")
        client = self.client()
        for command in ("STAT -C", "STAT -R", "STAT -1", "STAT 213\\ dir", "STAT -d 213\\ *", "STAT -C 213\\ *",
                        "STAT 213\\ dir 213\\ dir"):
            with self.subTest(command):
                self.assertEqual(client.code(command), 213)
                self.assertEqual(client.code("NOOP"), 200, client.exchange())

    def test_dots_lead_nowhere(self):
        outside = os.fsdecode(self.put("secret", b"secret", base=os.path.join(self.place, "outside")))
        relative = os.path.relpath(outside, self.home)
        os.symlink(outside, os.path.join(self.home, "absolute"))
        os.symlink("../outside/secret", os.path.join(self.home, "up"))
        os.symlink("../outside", os.path.join(self.home, "updir"))
        self.make_dir("sub")
        self.put("secret", b"mine")
        client = self.client()
        for path in (relative, "../" * 20 + outside, outside, "sub/../../" + relative, "/../outside/secret",
                     "sub/" + "../" * 3 + "outside/secret",
                     "absolute", "up", "updir/secret", "./../outside/secret", "//..//outside//secret", "...",
                     "..../secret", "..\\secret",
                     "~/../outside/secret", "~root/x"):
            with self.subTest(path), self.told(client):
                self.assertIn(client.fetch("RETR " + path)[0], (550, 553))
                self.assertIn(client.code("SIZE " + path), (550, 553))
                self.assertIn(client.code("MDTM " + path), (550, 553))
                self.assertIn(client.code("MLST " + path), (550, 553, 250) if path in ("absolute", "up") else (550,
                                                                                                               553))
                self.assertIn(client.code("RNFR " + path), (550, 553, 350) if path in ("absolute", "up") else (550,
                                                                                                               553))
                self.assertIn(client.code("SITE CHMOD 777 " + path), (550, 553))
                self.assertIn(client.code("MFMT 20200101000000 " + path), (550, 553))
                self.assertIn(client.store("STOR " + path + "/x", b"x")[0], (550, 553))
        self.assertEqual(self.content("secret", os.path.join(self.place, "outside")), b"secret")
        self.assertEqual(stat.S_IMODE(os.stat(outside).st_mode) & 0o7000, 0)
        for path in ("..", "/..", "sub/../..", "../" * 50, "updir/..", "/sub/../../../"):
            with self.subTest(path), self.told(client):
                client.code("CWD " + path)
                self.assertIn(b'"/"', client.say("PWD")[1])
        self.assertNotIn(b"outside", client.fetch("LIST ..")[2].replace(b"../outside",
                                                                        b"").replace(os.fsencode(outside), b""))

    def test_dot_files(self):
        self.put(".dot", b"dot")
        self.make_dir(".d")
        self.put(".d/file", b"x")
        for switches, read, write, enter in (((), 226, 226, 250), (("-x",), 226, 553, 250), (("-X",), 553, 553, 553)):
            with self.subTest(switches=switches):
                client = self.client(*switches)
                with self.told(client):
                    self.assertEqual(client.fetch("RETR .dot")[0], read)
                    self.assertEqual(client.fetch("RETR .d/file")[0], read)
                    self.assertEqual(client.store("STOR .dot", b"dot")[0], write)
                    self.assertEqual(client.store("STOR .d/new", b"dot")[0], write)
                    self.assertEqual(client.store("STOR sub/.../new", b"dot")[0], 553)
                    self.assertEqual(client.code("CWD .d"), enter)
                    self.assertEqual(client.code("CWD /"), 250)
                    self.assertEqual(client.code("MKD .new"), 553 if write == 553 else 257)
                    self.assertEqual(client.code("RMD .new"), 553 if write == 553 else 250)
                    self.assertEqual(client.code("RNFR .dot"), 553 if write == 553 else 350)
                    self.assertEqual(client.code("SITE CHMOD 644 .dot"), 553 if write == 553 else 200)
                    self.assertEqual(client.code("SIZE .dot"), 213)
                    self.assertEqual(client.code("MLST .dot"), 250)
                    self.assertEqual(client.code("CWD ."), 250)
                    self.assertEqual(client.code("CWD .."), 250)
                    self.put("plain", b"x")
                    self.assertEqual(client.code("RNFR plain"), 350)
                    self.assertEqual(client.code("RNTO .plain"), 553 if write == 553 else 250)
                    self.assertEqual(client.code("DELE .dot"), 553 if write == 553 else 250)
                    self.put(".dot", b"dot")

    def test_banner_and_message(self):
        base = os.path.join(self.place, "banner")
        self.put(".banner", b"Hello\nyou\x1b[0m\r\n230 no\n" + b"x" * 600 + b"\n" + b"y\n" * 200, base=base)
        self.put(".message", b"In here\n\n 250 no\n", base=base)
        client = self.client(user=None)
        client.code("USER banner")
        code, text = client.say("PASS secret")
        lines = text.split(b"\r\n")[:-1]
        self.assertEqual(code, 230)
        if PROTOCOL_ORIGINAL:
            lines.append(lines.pop(0))                  # the directory comes first
        self.assertEqual(lines[:2], [b"230-Hello", b"230-you_[0m"])
        self.assertIn(b"230 no", lines[2])
        self.assertLessEqual(len(lines), 102)
        self.assertLess(max(map(len, lines)), 520)
        code, text = client.say("CWD /")
        self.assertEqual(code, 250)
        self.assertIn(b"250-In here\r\n", text)
        self.assertEqual(client.code("NOOP"), 200)

    @unittest.skipIf(PROTOCOL_ORIGINAL, "waits for ever")
    def test_a_banner_that_is_no_file(self):
        base = os.path.join(self.place, "banner")
        os.mkfifo(os.path.join(base, ".banner"))
        os.symlink("/etc/passwd", os.path.join(base, ".message"))
        client = self.client(user="banner")
        self.assertEqual(client.say("CWD /")[1].count(b"\n"), 1)

    def test_aliases(self):
        if PROTOCOL_ORIGINAL:
            self.skipTest("needs its file")
        self.make_dir("sub")
        self.make_dir("sub/far")
        aliases = os.path.join(self.place, "aliases")
        with open(aliases, "w") as file:
            file.write("# a comment\nfar\n/sub/far\n\nnowhere\n/missing\nsub\n/\n")
        client = self.client(patches="pureftpd.ALIASES_FILE = %r" % aliases)
        self.play(client, """
            SITE ALIAS         -> 214 far /sub/far
            SITE ALIAS far     -> 214 /sub/far
            SITE ALIAS x       -> 502
            CWD far            -> 250
            PWD                -> 257 "/sub/far"
            CWD /              -> 250
            CWD far/           -> 550
            CWD nowhere        -> 550
            CWD sub            -> 250
            PWD                -> 257 "/sub"
        """)

    def test_what_is_not_a_file(self):
        self.make_dir("sub")
        os.mkfifo(os.path.join(self.home, "fifo"))
        self.give(os.path.join(self.home, "fifo"))
        os.symlink("nowhere", os.path.join(self.home, "dangling"))
        os.symlink("loop", os.path.join(self.home, "loop"))
        os.symlink("file", os.path.join(self.home, "link"))
        self.put("file", b"content")
        with socket.socket(socket.AF_UNIX) as sock:
            sock.bind(os.path.join(self.home, "sock"))
            if ROOT:
                os.mknod(os.path.join(self.home, "null"), stat.S_IFCHR | 0o666, os.makedev(1, 3))
                os.chmod(os.path.join(self.home, "null"), 0o666)
            client = self.client()
            for name in ["sub", "sock", "dangling", "loop"] + ["fifo"] * (not PROTOCOL_ORIGINAL) + ["null"] * ROOT:
                with self.subTest(name), self.told(client):
                    self.assertEqual(client.fetch("RETR " + name)[0], 550)
                    self.assertIn(client.store("STOR " + name, b"x")[0], (550, 553))
                    self.assertIn(client.store("APPE " + name, b"x")[0], (550, 553))
                    self.assertEqual(client.code("SIZE " + name), 550)
                    self.assertEqual(client.code("MDTM " + name), 550)
                    self.assertEqual(client.code("CWD " + name), 250 if name == "sub" else 550)
                    self.assertEqual(client.code("CWD /"), 250)
            self.assertEqual(client.fetch("RETR link")[::2], (226, b"content"), client.exchange())
            self.assertIn(client.store("STOR link", b"x")[0], (550, 553), client.exchange())
            for name in ["dangling", "loop", "link"] + ["fifo", "sock", *["null"] * ROOT] * (not PROTOCOL_ORIGINAL):
                self.assertEqual(client.code("DELE " + name), 250, client.exchange())
        self.assertEqual(self.content("file"), b"content")
        self.assertFalse(os.path.exists(os.path.join(self.home, "nowhere")))

    def test_listings_of_odd_patterns_end(self):
        for name in ("a" * 40, "b" * 40):
            self.put(name)
        client = self.client()
        for pattern in ("*" * 100, "*a" * 30, "*/../" * 200, "[" * 500, "?" * 1000, "*/*/*/*/*", "[a-z]*[!b]*[c-",
                        "\\" * 99, "{a,b}" * 50,
                        "-R *", "-" + "R" * 1000, "~", "~root"):
            with self.subTest(pattern[:20]), self.told(client):
                started = time.monotonic()
                self.assertIn(client.fetch("LIST " + pattern)[0], (226, 550))
                self.assertIn(client.fetch("NLST " + pattern)[0], (226, 550, 501))
                self.assertIn(client.code("STAT " + pattern), (213, 211))
                self.assertLess(time.monotonic() - started, 5)

    def test_listings(self):
        self.put("file", b"12345")
        self.make_dir("sub")
        self.put("sub/inner", b"x")
        client = self.client()
        with self.told(client):
            self.assertRegex(client.fetch("LIST")[2], rb"(?m)^-rw-r--r--    1 \S+ +\S+ +5 ... .. ..:.. file\r\n")
            self.assertEqual(sorted(client.fetch("NLST sub")[2].split()), [b"sub/.", b"sub/..", b"sub/inner"])
            self.assertEqual(client.fetch("MLSD file")[0], 501 if not PROTOCOL_ORIGINAL else 550)
            self.assertEqual(client.fetch("MLSD missing")[0], 550)
            self.assertEqual(client.fetch("LIST missing")[::2], (226, b""))
            self.assertIn(b" inner\r\n213 ", client.say("STAT sub")[1])
            self.assertEqual(client.say("STAT missing")[0], 213)


class Switches(Exam):
    """What the administrator's switches permit."""

    def mode(self, name):
        return stat.S_IMODE(os.stat(os.path.join(self.home, name)).st_mode)

    def test_names_while_uploading(self):
        self.put("file", b"old")
        self.make_dir("sub")
        client = self.client("-0")
        with client.passive() as data:
            self.assertEqual(client.code("STOR file"), 150)
            data.sendall(b"new")
            self.assertEqual(self.content("file"), b"old")
            names = set(os.listdir(self.home)) - {"file", "sub"}
            self.assertTrue(all(name.startswith(".pureftpd-upload.") for name in names) and len(names) == 1, names)
        self.assertEqual(client.reply()[0], 226)
        with self.told(client):
            self.assertEqual(self.content("file"), b"new")
            self.assertEqual(client.store("STOR sub/file", b"x")[0], 226)
            if not PROTOCOL_ORIGINAL:                            # facts 16
                self.assertEqual(client.store("STOR sub", b"x")[0], 553)
                self.assertEqual(client.store("APPE file", b"+")[0], 226)
                self.assertEqual(self.content("file"), b"new+")
                client.say("REST 3")
                self.assertEqual(client.store("STOR file", b"-")[0], 226)
                self.assertEqual(self.content("file"), b"new-")
                self.assertEqual(client.store("STOR .pureftpd-upload.x", b"-")[0], 553)
        self.assertEqual(sorted(os.listdir(self.home)), ["file", "sub"])

    def test_an_aborted_upload_does_not_replace_the_old_file(self):
        if PROTOCOL_ORIGINAL:
            self.skipTest("it does")
        self.put("file", b"old")
        client = self.client("-0")
        for end in (b"ABOR\r\n", None):
            with client.passive() as data:
                self.assertEqual(client.code("STOR file"), 150)
                data.sendall(b"new")
                if end:
                    client.send(end)
                    data.close()
                    self.assertEqual((client.reply()[0], client.reply()[0]), (426, 451), client.exchange())
                else:
                    client.sock.shutdown(socket.SHUT_WR)
                    data.close()
                    while client.sock.recv(100):
                        pass
        self.assertEqual((os.listdir(self.home), self.content("file")), (["file"], b"old"))

    def test_names_that_are_taken(self):
        client = self.client("-r")
        for content in (b"one", b"two", b"three"):
            self.assertEqual(client.store("STOR file", content)[0], 226, client.exchange())
        client.say("REST 3")
        self.assertEqual(client.store("STOR file", b"+")[0], 226, client.exchange())
        self.assertEqual({name: self.content(name) for name in os.listdir(self.home)},
                         {"file": b"one+", "file.1": b"two", "file.2": b"three"})
        if not PROTOCOL_ORIGINAL:
            self.assertEqual(client.store("APPE file", b"+")[0], 226, client.exchange())
            self.assertEqual(self.content("file"), b"one++")

    def test_files_that_are_kept(self):
        self.put("file", b"old")
        self.put("other", b"x")
        client = self.client("-K")
        self.play(client, "DELE file -> 550\nMKD sub -> 257\nRMD sub -> 250\nRNFR other -> 350\nRNTO file -> 250")
        self.assertEqual(client.store("STOR file", b"new")[0], 226)

    def test_what_stays_as_it_is(self):
        self.put("file", b"old")
        self.talk("RNFR file -> 550\nRNTO x -> 503", "-G")
        self.talk("SITE CHMOD 600 file -> 550\nCHMOD 600 file -> 550\nSITE UTIME 20200101000000 file -> 213", "-R")

    def test_modes(self):
        for switches, file_mode, directory_mode in (((), 0o644, 0o755), (("-U", "022:077"), 0o755, 0o700),
                                                    (("-U", "777:777"), 0, 0),
                                                    (("-Z", "-U", "777:777"), 0o600, 0o700))[:3 if PROTOCOL_ORIGINAL else 4]:
            with self.subTest(switches=switches):
                self.refresh()
                client = self.client(*switches)
                self.assertEqual(client.store("STOR file", b"x")[0], 226, client.exchange())
                self.assertEqual(client.code("MKD sub"), 257)
                self.assertEqual((self.mode("file"), self.mode("sub")), (file_mode, directory_mode))
        if PROTOCOL_ORIGINAL:
            return                                      # its uploads know no -Z
        self.play(client, "SITE CHMOD 0 file -> 200\nSITE CHMOD 0 sub -> 200")
        self.assertEqual((self.mode("file"), self.mode("sub")), (0o600, 0o700))

    def test_a_disk_that_is_rather_full(self):
        if PROTOCOL_ORIGINAL:
            self.skipTest("needs a disk")
        patch = "pureftpd.Tree.disk = lambda self: types.SimpleNamespace(f_blocks=100, f_bavail=5, f_frsize=4096)"
        for percent, code in ((90, 552), (96, 226)):
            with self.subTest(percent):
                client = self.client("-k", str(percent), patches=patch)
                self.assertEqual(client.store("STOR file", b"x")[0], code, client.exchange())
                self.assertEqual(client.store("APPE file", b"x")[0], code, client.exchange())
                self.assertEqual(client.code("MKD sub%d" % percent), 257)
                self.assertEqual(client.code("ALLO 20480"), 552 if code == 552 else 200)
                self.assertEqual(client.code("ALLO 20481"), 552)

    def test_idle_time_that_poll_cannot_wait_for(self):
        self.put("file", b"content")
        client = self.client("-I", "50000")
        self.assertEqual(client.code("NOOP"), 200)
        self.assertEqual(client.fetch("RETR file")[2], b"content")

    def test_extended_passive_mode_for_broken_clients(self):
        self.talk("EPSV -> 500\nEPSV ALL -> 500\nEPSV 2 -> 500\nPASV -> 227", "-b")

    def test_the_name_of_a_directory_is_taken_under_autorename(self):
        self.make_dir("name")
        client = self.client("-r")
        self.assertEqual(client.store("STOR name", b"content")[0], 226)
        self.assertEqual(self.content("name.1"), b"content")

    def test_idle_time(self):
        idle, busy = self.client(), self.client()
        for client in (idle, busy):
            self.assertEqual(client.code("SITE IDLE 1"), 200)
        started, codes = time.monotonic(), []
        while 421 not in codes:
            codes.append(busy.code("NOOP"))
            select.select([busy.sock], [], [], 0.25)
        self.assertEqual(set(codes), {200, 421})
        self.assertGreater(time.monotonic() - started, 1.9)
        self.assertLess(time.monotonic() - started, 6)
        self.assertEqual(idle.reply()[0], 421)
        self.assertTrue(idle.at_end() and busy.at_end())

    def test_who_is_locked_in(self):
        bob = os.path.join(self.place, "bob")
        self.put("file", b"x", base=bob)
        for switches, where in (((), os.path.realpath(bob)), (("-A",), "/"),
                                (("-a", str(EXAM_UID)), os.path.realpath(bob)),
                                (("-a", str(EXAM_UID + 1)), "/")):
            with self.subTest(switches=switches):
                client = self.client(*switches, user="bob")
                self.assertIn(b'"%s"' % os.fsencode(where), client.say("PWD")[1])
                self.assertEqual(client.code("SIZE file"), 213)
                self.assertEqual(client.code("CWD /etc"), 550 if where == "/" else 250)
                self.assertEqual(client.code("CWD ~"), 250)
                self.assertIn(b'"%s"' % os.fsencode(where), client.say("PWD")[1])

    @unittest.skipIf(ROOT or PROTOCOL_ORIGINAL, "with root the kernel decides")
    def test_the_servers_own_files_stay_its_own(self):
        database = self.users
        os.link(database, os.path.join(self.place, "bob", "hard"))
        os.symlink(database, os.path.join(self.place, "bob", "soft"))
        daemon = self.server()
        program = os.path.abspath(pureftpd.__file__)
        client = self.client(user="bob")
        for path in (database, "hard", "soft", "../users.pdb", program, database[:-4] + ".passwd",
                     os.path.join(daemon.directory, "state", "x"), "/proc/self/environ",
                     "/proc/%d/mem" % daemon.process.pid):
            with self.subTest(path), self.told(client):
                self.assertIn(client.fetch("RETR " + path)[::2], ((550, b""), (553, b"")))
                self.assertIn(client.store("STOR " + path, b"x")[0], (550, 553))
                self.assertIn(client.store("APPE " + path, b"x")[0], (550, 553))
        for script in ("RNFR %s -> 550" % database, "RNFR soft -> 350\nRNTO %s -> 550" % database,
                       "RNFR %s -> 350\nRNTO %s -> 550" % (self.place, self.place + "2"), "DELE %s -> 550" % database,
                       "SITE CHMOD 777 %s -> 550" % database):
            with self.subTest(script):
                self.play(client, script)
        self.assertEqual(pureftpd.puredb_find(database, b"nobody there"), None)


class TwoUploads(Exam):
    """Two sessions and one name: the first has said STOR and does not come, the second uploads meanwhile."""

    PATCHES = """
transfer = pureftpd.Session.transfer
def told(self, *rest):
    self.log.notice("waits for its data")
    return transfer(self, *rest)
pureftpd.Session.transfer = told
"""

    def server(self, *switches, patches=PATCHES):
        return super().server(*switches, patches=patches)

    def client(self, *switches, user="alice", patches=PATCHES):
        return super().client(*switches, user=user, patches=patches)

    def waiting(self, command, *switches, user="alice", offset=0):
        """(client, the port where its data is waited for)."""
        client = self.client(*switches, user=user)
        port = int(re.search(rb"\|(\d+)\|", client.say("EPSV")[1]).group(1))
        self.assertEqual(client.code("REST %d" % offset), 350)
        self.server(*switches).lines.clear()
        client.send(command.encode() + b"\r\n")
        self.server(*switches).wait_for("waits for its data")
        return client, port

    def come(self, client, port, content):
        with deadline_socket(socket.create_connection(("127.0.0.1", port), EXAM_SECONDS)) as data:
            code = client.reply()[0]
            if code != 150:
                return code
            data.sendall(content)
        return client.reply()[0]

    def setUp(self):
        super().setUp()
        if PROTOCOL_ORIGINAL:
            self.skipTest("it leaves what the faster one has written")

    def test_who_never_came_removes_nothing_of_others(self):
        for content in (b"complete", b""):
            for end in ("ABOR", "close"):
                with self.subTest(end, content=content):
                    first, _ = self.waiting("STOR file")
                    self.assertEqual(self.client().store("STOR file", content)[0], 226)
                    if end == "ABOR":
                        first.code("ABOR")
                    first.close()
                    self.server().wait_for("Logout")
                    self.assertEqual(self.client().fetch("RETR file")[::2], (226, content))
                    self.assertEqual(self.client().code("DELE file"), 250)

    def test_who_never_came_leaves_nothing_behind(self):
        first, _ = self.waiting("STOR file")
        self.assertEqual(os.listdir(self.home), ["file"])
        self.assertEqual(first.code("ABOR"), 426, first.exchange())
        self.assertEqual(os.listdir(self.home), [])

    def test_the_last_that_begins_wins(self):
        first, port = self.waiting("STOR file")
        self.assertEqual(self.client().store("STOR file", b"second and longer")[0], 226)
        self.assertEqual(self.come(first, port, b"first"), 226, first.exchange())
        self.assertEqual(self.content("file"), b"first")

    def test_appending_goes_where_the_file_ends_then(self):
        self.put("file", b"old,")
        first, port = self.waiting("APPE file")
        self.assertEqual(self.client().store("APPE file", b"second,")[0], 226)
        self.assertEqual(self.come(first, port, b"first,"), 226, first.exchange())
        self.assertEqual(self.content("file"), b"old,second,first,")

    def test_a_file_that_got_too_short_to_go_on_with(self):
        self.put("file", b"0123456789")
        first, port = self.waiting("STOR file", offset=5)
        self.assertEqual(self.client().store("STOR file", b"abc")[0], 226)
        with deadline_socket(socket.create_connection(("127.0.0.1", port), EXAM_SECONDS)):
            self.assertEqual([first.reply()[0], first.reply()[0]], [150, 451], first.exchange())
        self.assertEqual(self.content("file"), b"abc")

    @unittest.skipUnless(ROOT, "needs root")
    def test_anonymous_users_overwrite_nothing_of_each_other(self):
        for switches in ((), ("-0",)):
            with self.subTest(switches):
                first, port = self.waiting("STOR file", *switches, user="ftp")
                other = self.client(*switches, user="ftp")
                code = other.store("STOR file", b"honest")[0]
                self.assertEqual(code, 226 if switches else 450, other.exchange())
                self.assertEqual(self.come(first, port, b"bad"), 550 if switches else 226, first.exchange())
                self.assertEqual(self.content("file", self.ftp), b"honest" if switches else b"bad")
                self.assertEqual(os.listdir(self.ftp), ["file"])
                self.refresh()

    def test_a_file_that_is_deleted_meanwhile_is_given_back(self):
        for command in ("DELE file", "RNTO file"):
            with self.subTest(command):
                second = self.client(user="quota")
                self.assertEqual(second.store("STOR file", bytes(3000))[0], 226)
                self.assertEqual(second.store("STOR other", bytes(10))[0], 226)
                first, _ = self.waiting("STOR file", user="quota")
                self.assertEqual(second.code("RNFR other"), 350)
                self.assertEqual(second.code(command), 250)
                self.assertEqual(first.code("ABOR"), 426, first.exchange())
                self.assertEqual(self.content(".ftpquota", os.path.join(self.place, "quota")).split(), [b"1", b"10"])
                self.refresh()

    def test_a_file_that_cannot_take_its_name_leaves_nothing_behind(self):
        client = self.client("-0", user="quota")
        with client.passive() as data:
            self.assertEqual(client.code("STOR file"), 150)
            data.sendall(bytes(3000))
            self.assertEqual(self.client("-0", user="quota").code("MKD file"), 257)
        self.assertEqual(client.reply()[0], 553, client.exchange())
        home = os.path.join(self.place, "quota")
        self.assertEqual(sorted(os.listdir(home)), [".ftpquota", "file"])
        self.assertEqual(self.content(".ftpquota", home).split(), [b"1", b"0"])


class Fortunes(Exam):
    def test_the_notes_follow_and_tabs_are_blanks(self):
        path = os.path.join(self.place, "fortunes")
        with open(path, "wb") as file:
            file.write(b"one line\n\t-- somebody\n")
        client = ExamClient(self.server("-F", path, "-E", "-Q", "1:5").connect())
        self.addCleanup(client.close)
        code, text = client.reply()
        if not PROTOCOL_ORIGINAL:
            self.assertEqual(text.split(b"\r\n"), [
                b"220-one line", b"        -- somebody", b"220-This is a private system - No anonymous login",
                b"220 All users: for 5 downloaded bytes, upload 1", b""])
        self.assertEqual(code, 220)


class Homes(unittest.TestCase):
    """What -j makes."""

    def setUp(self):
        self.place = os.fsencode(tempfile.mkdtemp())
        self.addCleanup(shutil.rmtree, self.place)
        os.chmod(self.place, 0o755)

    def make(self, root, start):
        home = pureftpd.Home(self.place + root, start, True, False)
        pureftpd.home_make(home, mock.Mock(uid=EXAM_UID, gid=EXAM_UID), mock.Mock(umask=(0o022, 0o022)))

    def owner(self, path):
        st = os.stat(self.place + path)
        return stat.S_IMODE(st.st_mode), st.st_uid, st.st_gid

    def test_missing_parents_are_the_servers(self):
        os.symlink(b"there", self.place + b"/link")
        os.mkdir(self.place + b"/there")
        os.chmod(self.place + b"/there", 0o311)             # nobody needs to list it
        self.addCleanup(os.chmod, self.place + b"/there", 0o755)
        self.make(b"/link/a/b/home", b"/in/side")
        user = (EXAM_UID, EXAM_UID) if ROOT else (os.geteuid(), os.getegid())
        self.assertEqual(self.owner(b"/there/a/b/home/in/side"), (0o755, *user))
        for path in (b"/there/a", b"/there/a/b", b"/there/a/b/home/in"):
            self.assertEqual(self.owner(path), (0o755, os.geteuid(), 0 if ROOT else os.getegid()))

    @unittest.skipUnless(ROOT, "needs root")
    def test_no_link_of_a_user_is_followed(self):
        for path in (b"/secret", b"/home"):
            os.mkdir(self.place + path, 0o700)
        os.chown(self.place + b"/home", EXAM_UID, EXAM_UID)
        os.symlink(self.place + b"/secret", self.place + b"/home/link")
        with self.assertRaises(OSError):
            self.make(b"/home", b"/link/new")
        os.symlink(self.place + b"/secret/new", self.place + b"/home/last")
        with self.assertRaises(OSError):
            self.make(b"/home", b"/last")
        self.assertEqual(os.listdir(self.place + b"/secret"), [])


class Faults(Exam):
    """What goes wrong, and what is left then."""

    def test_what_the_disk_refuses_is_in_the_log(self):
        if PROTOCOL_ORIGINAL:
            self.skipTest("looks into our log")
        os.chmod(self.make_dir("shut"), 0o500)
        self.put("file")
        client, daemon = self.client(), self.server()
        for command, reason in (
                ("CWD nowhere", "No such file or directory"), ("MKD shut", "File exists"), ("MKD shut/sub", "Permission denied"),
                ("RMD nothing", "No such file or directory"), ("RETR nothing", "No such file or directory"),
                ("STOR shut/new", "Permission denied"), ("APPE shut/new", "Permission denied"),
                ("STOR nowhere/new", "No such file or directory"), ("STOR shut", "That is no regular file")):
            with self.subTest(command):
                self.assertGreaterEqual(client.fetch(command)[0], 550)
                daemon.wait_for(r"\[%s\] Failed %s: %s$" % ("INFO" if command[:3] == "CWD" else "ERROR", command, reason))
        self.assertEqual((client.code("RNFR file"), client.code("RNTO shut/file")), (350, 550))
        daemon.wait_for(r"\[ERROR\] Failed RNTO shut/file: Permission denied$")

    def test_the_client_goes_away_during_a_transfer(self):
        if PROTOCOL_ORIGINAL:
            self.skipTest("looks into our log")
        daemon = self.server()
        self.put("big", b"")
        os.truncate(os.path.join(self.home, "big"), 64 << 20)
        for number in range(5):
            for verb, word in (("STOR up%d" % number, "uploaded"), ("RETR big", "downloaded")):
                client = self.client()
                with client.passive() as data:
                    self.assertEqual(client.code(verb), 150)
                    if word == "uploaded":
                        data.sendall(b"x" * 1000)
                    else:
                        data.recv(1000)
                    client.sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
                    client.close()
                daemon.wait_for(r"(up%d|big) %s .* incomplete|up%d uploaded  \(1000 bytes" % (number, word, number))
        self.assertEqual(self.client().code("NOOP"), 200)

    @unittest.skipUnless(ROOT, "needs root")
    def test_a_disk_that_fills_up(self):
        if subprocess.call(["mount", "-t", "tmpfs", "-o", "size=1m,mode=777", "none", self.home],
                           stderr=subprocess.DEVNULL):
            self.skipTest("cannot mount here")
        self.addCleanup(subprocess.check_call, ["umount", "-l", self.home])
        for kind, switches in (("I", ()), ("A", ()), ("I", ("-0",))):
            with self.subTest(kind=kind, switches=switches):
                client = self.client(*switches)
                client.say("TYPE " + kind)
                with client.passive() as data:
                    self.assertEqual(client.code("STOR file"), 150)
                    with contextlib.suppress(ConnectionError):
                        data.sendall(b"x" * (4 << 20))
                code = client.reply()[0]
                if not PROTOCOL_ORIGINAL:
                    self.server(*switches).wait_for(r"\[ERROR\] The transfer failed: No space left on device")
                self.assertIn(code, (452, 552) if not PROTOCOL_ORIGINAL else (451, 452, 552), client.exchange())
                if PROTOCOL_ORIGINAL:
                    continue
                stored = int(self.server(*switches).wait_for(r"file uploaded  \((\d+) bytes.* incomplete").group(1))
                if switches:
                    self.assertEqual(os.listdir(self.home), [])
                else:
                    self.assertEqual(client.say("SIZE file")[1], b"213 %d\r\n" % stored)
                    self.assertEqual(client.code("DELE file"), 250)
                self.server(*switches).lines.clear()


# ==== Tests: defender =============================================================================


def guess(defender, address, now, tries, right=False):
    """Make `tries` as fast as the defender permits; the clock afterwards, the pauses, whether it came to a ban."""
    pauses = []
    for _ in range(tries):
        while True:
            wait = defender.delay(address, now)
            if not wait:
                break
            now += wait
        pause, banned = defender.failed(address, now)
        pauses.append(pause)
        if banned:
            return now, pauses, True
    return now, pauses, False


class DefenderTest(unittest.TestCase):
    def test_pauses_grow_after_the_free_failures_up_to_a_limit(self):
        _, pauses, banned = guess(Defender(), "192.0.2.1", 0.0, 10)
        self.assertEqual(pauses, [0, 0, 1, 2, 4, 8, 16, 30, 30, 30])
        self.assertFalse(banned)

    def test_a_patient_guesser_is_banned_again_and_again(self):
        defender, now, guesses = Defender(), 0.0, 0
        while now < 3600 * 10:
            now, pauses, _ = guess(defender, "192.0.2.1", now, 1000)
            guesses += len(pauses)
        self.assertLess(guesses / 10, 30)                   # an hour

    def test_a_ban_expires_and_is_announced_once(self):
        defender = Defender(ban_after=5, ban_time=100)
        now, pauses, banned = guess(defender, "192.0.2.1", 1000.0, 50)
        self.assertTrue(banned)
        self.assertEqual(len(pauses), 5)
        self.assertEqual(defender.banned("192.0.2.1", now), 100)
        self.assertEqual(defender.delay("192.0.2.1", now + 40), 60)
        self.assertFalse(defender.failed("192.0.2.1", now + 41)[1])
        self.assertGreater(defender.banned("192.0.2.1", now + 99), 0)
        self.assertEqual(defender.banned("192.0.2.1", now + 100), 0)
        self.assertEqual(defender.delay("192.0.2.1", now + 100), 0)

    def test_other_addresses_are_not_concerned(self):
        defender = Defender(ban_after=5)
        now, *_ = guess(defender, "192.0.2.1", 0.0, 50)
        self.assertEqual(defender.banned("192.0.2.2", now), 0)
        self.assertEqual(defender.delay("192.0.2.2", now), 0)

    def test_ipv6_counts_by_64_and_mapped_ipv4_as_ipv4(self):
        defender = Defender(ban_after=5)
        now, *_ = guess(defender, "2001:db8:1:2:3::4", 0.0, 50)
        for address, banned in (("2001:db8:1:2:ffff::", True), ("2001:db8:1:3::", False), ("fe80::1%eth0", False)):
            self.assertEqual(defender.banned(address, now) > 0, banned, address)
        now, *_ = guess(defender, "::ffff:192.0.2.7", now, 50)
        self.assertTrue(defender.banned("192.0.2.7", now))
        self.assertFalse(defender.banned("192.0.2.8", now))
        self.assertFalse(defender.banned("::1", now))

    def test_parallel_connections_help_nobody(self):
        """One round: ask for as many checks as are given, then let all of them fail."""
        for limit in (1, 2, 3, 5, 8, 20):
            defender, now, tried = Defender(ban_after=limit), 0.0, 0
            while not defender.banned("192.0.2.1", now):
                started = 0
                while not defender.delay("192.0.2.1", now):
                    started += 1
                self.assertLessEqual(started, pureftpd.DEFENDER_PARALLEL)
                for _ in range(started):
                    defender.failed("192.0.2.1", now)
                tried += started
                now += 0.25
            self.assertLessEqual(tried, limit + 3, limit)       # those that time has forgiven meanwhile
            self.assertGreaterEqual(tried, limit)
            self.assertEqual(defender.suspects[b"\xc0\x00\x02\x01"].pending, 0)

    def test_a_suspect_is_checked_once_at_a_time(self):
        defender = Defender()
        now, *_ = guess(defender, "192.0.2.1", 0.0, 4)
        now += 60
        self.assertEqual(defender.delay("192.0.2.1", now), 0)
        self.assertEqual(defender.delay("192.0.2.1", now), pureftpd.DEFENDER_BUSY)
        defender.succeeded("192.0.2.1")
        self.assertEqual(defender.delay("192.0.2.1", now), 0)

    def test_many_parallel_logins_of_a_client_with_the_right_password(self):
        defender = Defender()
        for _ in range(100):
            for _ in range(pureftpd.DEFENDER_PARALLEL):
                self.assertEqual(defender.delay("192.0.2.1", 5.0), 0)
            for _ in range(pureftpd.DEFENDER_PARALLEL):
                defender.succeeded("192.0.2.1")
        self.assertFalse(defender.suspects)

    def test_a_success_does_not_wash_clean(self):
        defender, now, guesses, banned = Defender(ban_after=10), 0.0, 0, False
        while not banned:
            now, pauses, banned = guess(defender, "192.0.2.1", now, 1)
            guesses += len(pauses)
            self.assertLess(guesses, 15)
            if not banned:
                now += 60
                self.assertEqual(defender.delay("192.0.2.1", now), 0)
                defender.succeeded("192.0.2.1")

    def test_failures_are_forgotten_in_time(self):
        defender = Defender(ban_after=20, ban_time=600)
        for day in range(200):                              # three typing errors a day for half a year
            _, pauses, banned = guess(defender, "192.0.2.1", day * 86400.0, 3)
            self.assertEqual((pauses, banned), ([0, 0, 1], False))

    def test_exempt_networks_and_switched_off(self):
        exempt = Defender(ban_after=2, never=pureftpd.parse_networks("10.0.0.0/8, 2001:db8::/32,192.0.2.1"))
        for defender, address in ((exempt, "10.1.2.3"), (exempt, "::ffff:10.1.2.3"), (exempt, "2001:db8::1"),
                                  (exempt, "192.0.2.1"), (Defender(ban_after=0), "8.8.8.8")):
            with self.subTest(address):
                self.assertEqual(guess(defender, address, 0.0, 100), (0.0, [0.0] * 100, False))
                self.assertEqual(len(defender.suspects), 0)
        self.assertTrue(guess(exempt, "192.0.2.2", 0.0, 100)[2])

    def test_memory_is_bounded_and_who_is_being_checked_is_kept(self):
        defender = Defender(addresses=100)
        self.assertEqual(defender.delay("192.0.2.1", 0.0), 0)
        for i in range(1000):
            defender.failed("10.0.%d.%d" % divmod(i, 256), float(i))
        self.assertEqual(len(defender.suspects), 100)
        self.assertIn(b"\xc0\x00\x02\x01", defender.suspects)
        self.assertTrue(defender.suspects[b"\x0a\x00\x03\xe7"].level)

    def test_what_is_no_address_is_counted_by_its_text(self):
        defender = Defender(ban_after=2, never=pureftpd.parse_networks("10.0.0.0/8"))
        now, _, banned = guess(defender, "", 0.0, 10)
        self.assertTrue(banned)

    def test_a_broken_back_end_is_not_the_clients_fault(self):
        defender = Defender(ban_after=2)
        for _ in range(100):
            self.assertEqual(defender.delay("192.0.2.1", 0.0), 0)
            defender.withdrawn("192.0.2.1")
        self.assertFalse(defender.banned("192.0.2.1", 0.0))


# ==== Tests: tls ==================================================================================


OPENSSL = shutil.which("openssl")


def openssl(*words, feed=b""):
    """What openssl(1) prints."""
    return subprocess.run(["openssl", *words], input=feed, stdout=subprocess.PIPE, stderr=subprocess.PIPE, check=True,
                          timeout=EXAM_SECONDS).stdout


def client_context(**settings):
    """A client that does not ask whom it speaks to."""
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    context.check_hostname, context.verify_mode = False, ssl.CERT_NONE
    context.options &= ~getattr(ssl, "OP_IGNORE_UNEXPECTED_EOF", 0x80)      # which some versions of Python set
    for name, value in settings.items():
        setattr(context, name, value)
    return context


class TlsData:
    """The client's end of a data connection: the handshake waits for the first use, as 150 comes before it."""

    def __init__(self, client, sock, polite=True):
        self.client, self.sock, self.polite = client, sock, polite
        self.tls = None

    def secured(self):
        if self.tls is None:
            session = self.client.sock.session if self.client.resume else None
            self.tls = self.client.context.wrap_socket(self.sock, session=session, suppress_ragged_eofs=False)
            self.reused = self.tls.session_reused
        return self.tls

    def recv(self, count):
        return self.secured().recv(count)

    def sendall(self, data):
        self.secured().sendall(data)

    def __enter__(self):
        return self

    def __exit__(self, *_):
        if self.tls is None:
            self.sock.close()
            return
        with self.tls:
            if self.polite:
                with contextlib.suppress(OSError, ValueError):
                    self.tls.unwrap()


class TlsClient(ExamClient):
    """A client that can say AUTH TLS."""

    resume = True                   # whether data connections resume the TLS session

    def __init__(self, sock, context=None):
        super().__init__(sock)
        self.context = context or client_context()
        self.protected = False      # whether data connections are under TLS

    def handshake(self, name=None, session=None):
        self.sock = self.context.wrap_socket(self.sock, server_hostname=name, session=session, suppress_ragged_eofs=False)

    def secure(self, name=None, session=None):
        """AUTH TLS, and what follows."""
        code = self.code("AUTH TLS")
        if code != 234:
            raise AssertionError(self.exchange())
        self.handshake(name, session)

    def login(self, user="alice", password="secret"):
        """The code of the last reply."""
        code = self.code("USER " + user)
        return self.code("PASS " + password) if code == 331 else code

    def protect(self, level="P"):
        self.protected = level == "P"
        return self.code("PBSZ 0"), self.code("PROT " + level), self.code("TYPE I")

    def data(self, polite=True, command="EPSV"):
        sock = self.passive(command)
        return TlsData(self, sock, polite) if self.protected else sock


class TlsExam(Exam):
    """Servers with certificates."""

    @classmethod
    def setUpClass(cls):
        if PROTOCOL_ORIGINAL:
            raise unittest.SkipTest("about pureftpd.py's own TLS")
        if not OPENSSL:
            raise unittest.SkipTest("there is no openssl(1) to make certificates with")
        super().setUpClass()
        cls.certificate = cls.make_certificate("localhost")

    @classmethod
    def make_certificate(cls, name, days="30", path=None):
        """The path of a file with a fresh key and a certificate of it."""
        path = path or os.path.join(cls.place, name + ".pem")
        made = openssl("req", "-x509", "-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:prime256v1", "-nodes", "-days", days,
                       "-subj", "/CN=" + name, "-addext", "subjectAltName=DNS:" + name, "-keyout", path + ".new")
        with open(path + ".new", "ab") as file:
            file.write(made)
        os.replace(path + ".new", path)
        return path

    @staticmethod
    def der(path):
        with open(path) as file:
            text = file.read()
        return ssl.PEM_cert_to_DER_cert(text[text.index("-----BEGIN CERT"):])

    def daemon(self, *switches, patches=""):
        return self.server("-Y", "1", "-2", self.certificate, "-E", *switches, patches=patches)

    def visitor(self, *switches, patches="", context=None, greeted=True):
        """A client that has been greeted."""
        client = TlsClient(self.daemon(*switches, patches=patches).connect(), context)
        self.addCleanup(client.close)
        if greeted:
            self.assertEqual(client.reply()[0], 220, client.exchange())
        return client

    def secured(self, *switches, user="alice", patches="", context=None, level="P"):
        """A client that has logged in over TLS, unless `user` is None, and protects its data."""
        client = self.visitor(*switches, patches=patches, context=context)
        client.secure()
        if user:
            self.assertEqual(client.login(user), 230, client.exchange())
            self.assertEqual(client.protect(level), (200, 200, 200), client.exchange())
        return client

    def fetch(self, client, command, **how):
        return client.fetch(command, client.data(**how))

    def store(self, client, command, content, **how):
        return client.store(command, content, client.data(**how))

    @staticmethod
    def rest(client):
        """What comes until the server closes."""
        data = b""
        with contextlib.suppress(ConnectionResetError):
            while True:
                more = client.sock.recv(65536)
                if not more:
                    break
                data += more
        return data

    def until(self, question, what):
        """Wait till `question()` is true: it is asked again and again."""
        deadline = time.monotonic() + EXAM_SECONDS
        while not question():
            self.assertLess(time.monotonic(), deadline, what)
        return True


def process_memory(pid):
    """All that a process can write to."""
    parts = []
    with open("/proc/%d/maps" % pid) as maps, open("/proc/%d/mem" % pid, "rb", buffering=0) as memory:
        for line in maps:
            extent, rights = line.split()[:2]
            if rights.startswith("rw"):
                start, end = (int(word, 16) for word in extent.split("-"))
                memory.seek(start)
                parts.append(memory.read(end - start))
    return b"".join(parts)


def processes_below(pid):
    """(pid, title) of every child of `pid`."""
    found = []
    with open("/proc/%d/task/%d/children" % (pid, pid)) as file:
        for child in file.read().split():
            with contextlib.suppress(OSError), open("/proc/%s/cmdline" % child) as title:
                found.append((int(child), title.read().strip("\0")))
    return found


class TlsCommands(TlsExam):
    """RFC 4217: AUTH, PBSZ, PROT, CCC, and what -Y asks for."""

    def test_without_tls_nothing_is_offered(self):
        self.talk("""
            AUTH TLS -> 502
            PBSZ 0   -> 503
            PROT P   -> 503
            CCC      -> 534
        """, "-E", user=None)
        self.assertNotIn(b"AUTH", self.client("-E", user=None).say("FEAT")[1])

    def test_what_is_offered_is_in_feat(self):
        text = self.visitor().say("FEAT")[1]
        for line in (b" AUTH TLS", b" PBSZ", b" PROT", b" CCC"):
            self.assertIn(line + b"\r\n", text)

    def test_level_1_lets_everybody_in(self):
        client = self.visitor()
        self.assertEqual(client.login(), 230, client.exchange())
        self.assertEqual((client.code("PBSZ 0"), client.code("PROT P"), client.code("AUTH TLS")), (503, 503, 503))

    def test_level_2_wants_tls_before_the_user(self):
        client = self.visitor("-Y", "2")
        code, text = client.say("USER alice")
        self.assertEqual((code, b"AUTH TLS" in text), (530, True), text)
        self.assertEqual((client.code("PASS secret"), client.code("NOOP")), (530, 200))
        client.secure()
        self.assertEqual(client.login(), 230, client.exchange())
        self.put("x", b"in the clear")
        self.assertEqual(client.fetch("RETR x")[::2], (226, b"in the clear"))

    def test_level_3_wants_protected_data(self):
        client = self.visitor("-Y", "3")
        self.assertEqual(client.code("USER alice"), 530)
        client.secure()
        self.assertEqual(client.login(), 230, client.exchange())
        for command in ("LIST", "NLST", "MLSD", "MLST", "RETR x", "STOR x", "APPE x", "STOU"):
            self.assertEqual(client.code(command), 521, client.exchange())
        self.assertEqual((client.code("STAT"), client.code("STAT /")), (211, 213))
        client.protect()
        self.put("x", b"secret")
        self.assertEqual(self.fetch(client, "RETR x")[::2], (226, b"secret"))
        self.assertEqual((client.code("PROT C"), client.code("RETR x")), (200, 521))

    def test_mechanisms_of_auth(self):
        client = self.visitor()
        for mechanism in ("SSL", "NONE", "GSSAPI", "TLS-P", ""):
            self.assertEqual(client.code("AUTH " + mechanism), 504, mechanism)
        self.assertEqual(client.code("auth tls-c"), 234)
        client.handshake()
        self.assertEqual(client.code("NOOP"), 200)
        client = self.visitor("--tlsauthssl")
        self.assertEqual(client.code("AUTH SSL"), 234)
        client.handshake()
        self.assertEqual(client.login(), 230)

    def test_protection_is_chosen_at_any_time(self):
        client = self.visitor()
        client.secure()
        for command, code in (("AUTH TLS", 234), ("CCC", 534), ("PROT P", 200), ("PBSZ 4096", 200), ("PBSZ", 200), ("PROT", 503),
                              ("PROT p", 534), ("PROT X", 534), ("PROT S", 200), ("PROT E", 200), ("PROT C", 200), ("PROT P", 200)):
            self.assertEqual(client.code(command), code, client.exchange())
        self.assertEqual(client.login(), 230)
        client.protected = True
        self.put("x", b"data")
        self.assertEqual(self.fetch(client, "RETR x")[::2], (226, b"data"))
        self.assertEqual(client.code("PROT x"), 534)            # which falls back to clear
        client.protected = False
        self.assertEqual(self.fetch(client, "RETR x")[::2], (226, b"data"))

    def test_ccc_uncovers_the_control_connection_alone(self):
        client = self.secured()
        self.assertEqual(client.code("CCC"), 200)
        client.sock = client.sock.unwrap()
        self.assertIsNone(client.sock.version())
        client.resume = False
        self.put("x", b"still secret")
        self.assertEqual(self.fetch(client, "RETR x")[::2], (226, b"still secret"))
        for command, code in (("NOOP", 200), ("PROT C", 503), ("AUTH TLS", 503), ("CCC", 534), ("QUIT", 221)):
            self.assertEqual(client.code(command), code, client.exchange())
        self.assertTrue(client.at_end())

    def test_commands_in_the_clear_behind_auth_are_thrown_away(self):
        client = self.visitor()
        client.send(b"AUTH TLS\r\nUSER alice\r\nPASS secret\r\nDELE x\r\n")
        self.assertEqual(client.reply()[0], 503)
        self.assertTrue(client.at_end(), client.exchange())

    def test_what_is_sent_before_the_login_is_not_lost(self):
        client = self.visitor()
        client.secure()
        client.send(b"PBSZ 0\r\nPROT P\r\nUSER alice\r\nPASS wrong\r\nPASS secret\r\nPWD\r\n" + b"NOOP\r\n" * 1200 + b"SYST\r\n")
        codes = [client.reply()[0] for _ in range(1207)]
        self.assertEqual(codes, [200, 200, 331, 530, 230, 257] + [200] * 1200 + [215], client.exchange())


class TlsHandshakes(TlsExam):
    """Versions, ciphers, certificates, names, ALPN, time limits."""

    def test_alpn_is_ftp_where_it_is_offered(self):
        for offered, chosen in ((["ftp"], "ftp"), (["http/1.1", "ftp"], "ftp"), (["http/1.1"], None), (None, None)):
            with self.subTest(offered=offered):
                client = self.visitor()
                if offered:
                    client.context.set_alpn_protocols(offered)
                client.secure()
                self.assertEqual(client.sock.selected_alpn_protocol(), chosen)
                self.assertEqual(client.code("NOOP"), 200)

    def old_client(self, *switches, version):
        """The version of TLS that a client gets that knows nothing newer; None for a failure."""
        context = client_context()
        with contextlib.suppress(ssl.SSLError):
            context.set_ciphers("DEFAULT:@SECLEVEL=0")
        import warnings
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            context.minimum_version = ssl.TLSVersion.TLSv1
            context.maximum_version = version
        client = self.visitor(*switches, context=context)
        try:
            client.secure()
            self.assertEqual(client.code("NOOP"), 200)
            return client.sock.version()
        except (ssl.SSLError, ConnectionError):
            return None

    def test_versions(self):
        v1_1, v1_2 = ssl.TLSVersion.TLSv1_1, ssl.TLSVersion.TLSv1_2
        self.assertEqual(self.old_client(version=v1_1), None)
        self.assertEqual(self.old_client(version=v1_2), "TLSv1.2")
        self.assertEqual(self.old_client("--tlsminversion", "1.3", version=v1_2), None)
        self.assertEqual(self.old_client("--tlsminversion", "1.0", version=v1_1), "TLSv1.1")

    def test_ciphers(self):
        client = self.visitor("-J", "ECDHE-ECDSA-CHACHA20-POLY1305", context=client_context(
            maximum_version=ssl.TLSVersion.TLSv1_2))
        client.secure()
        self.assertEqual(client.sock.cipher()[0], "ECDHE-ECDSA-CHACHA20-POLY1305")
        context = client_context(maximum_version=ssl.TLSVersion.TLSv1_2)
        context.set_ciphers("ECDHE-ECDSA-AES128-GCM-SHA256")
        client = self.visitor("-J", "ECDHE-ECDSA-CHACHA20-POLY1305", context=context)
        with self.assertRaises((ssl.SSLError, ConnectionError)):
            client.secure()

    def test_client_certificates(self):
        key = os.path.join(self.place, "client.pem")
        request = openssl("req", "-new", "-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:prime256v1", "-nodes", "-subj", "/CN=alice",
                          "-keyout", key)
        signed = openssl("x509", "-req", "-CA", self.certificate, "-CAkey", self.certificate, "-CAcreateserial",
                         "-CAserial", key + ".srl", "-days", "2", feed=request)
        with open(key, "ab") as file:
            file.write(signed)
        client = self.visitor("-J", "-C:HIGH")
        with self.assertRaises((ssl.SSLError, ConnectionError, EOFError)):      # TLS 1.3 tells it with the first read
            client.secure()
            client.code("NOOP")
        client = self.visitor("-J", "-C:HIGH")
        client.context.load_cert_chain(key)
        client.secure()
        self.assertEqual(client.login(), 230)
        client.protect()
        self.put("x", b"for alice")
        for client.resume in (False, True):
            self.assertEqual(self.fetch(client, "RETR x")[::2], (226, b"for alice"))

    def test_certificate_and_key_in_two_files(self):
        with open(self.certificate) as file:
            text = file.read()
        start = text.index("-----BEGIN CERT")
        crt, key = os.path.join(self.place, "two.crt"), os.path.join(self.place, "two.key")
        for path, content in ((crt, text[start:]), (key, text[:start])):
            with open(path, "w") as file:
                file.write(content)
        context = ssl.create_default_context(cafile=crt)
        client = TlsClient(self.server("-Y", "1", "-2", crt + "," + key, "-E").connect(), context)
        self.addCleanup(client.close)
        client.reply()
        client.secure("localhost")                          # the client checks chain and name
        self.assertEqual(client.code("NOOP"), 200)

    def test_implicit_tls(self):
        server = self.daemon("--tlsbind", "127.0.0.1,0")
        port = int(server.wait_for(r"port (\d+) \(TLS\)").group(1))
        client = TlsClient(deadline_socket(socket.create_connection(("127.0.0.1", port), EXAM_SECONDS)))
        self.addCleanup(client.close)
        client.handshake()
        self.assertEqual((client.reply()[0], client.login()), (220, 230), client.exchange())
        client.protect()
        self.put("x", b"implicit")
        self.assertEqual(self.fetch(client, "RETR x")[::2], (226, b"implicit"))
        self.secured("--tlsbind", "127.0.0.1,0")            # the other port is as it was

    def extcert(self):
        directory = os.path.join(self.place, "certs")
        if not os.path.isdir(directory):
            os.mkdir(directory)
            for name in ("a.example", "b.example"):
                self.make_certificate(name, path=os.path.join(directory, name + ".pem"))
        return directory

    def presented(self, name, *switches):
        """The certificate that a client of host `name` sees."""
        client = self.visitor(*switches)
        client.secure(name)
        self.assertEqual(client.code("NOOP"), 200)
        return client.sock.getpeercert(True)

    def test_certificates_by_host_name(self):
        directory = self.extcert()
        for name in ("a.example", "b.example"):
            self.assertEqual(self.presented(name, "-3", directory), self.der(os.path.join(directory, name + ".pem")))
        self.assertEqual(self.presented("A.EXAMPLE", "-3", directory), self.der(os.path.join(directory, "a.example.pem")))
        for name in ("c.example", None):
            self.assertEqual(self.presented(name, "-3", directory), self.der(self.certificate))

    def test_a_broken_certificate_of_a_host_is_replaced_by_that_of_all(self):
        directory = self.extcert()
        with open(os.path.join(directory, "broken.example.pem"), "w") as file:
            file.write("nonsense")
        self.addCleanup(os.unlink, file.name)
        self.assertEqual(self.presented("broken.example", "-3", directory), self.der(self.certificate))
        self.daemon("-3", directory).wait_for("ERROR.*broken.example.pem")

    def client_hello(self, name):
        """The bytes with which a client of host `name` begins."""
        outgoing = ssl.MemoryBIO()
        with contextlib.suppress(ssl.SSLWantReadError):
            client_context().wrap_bio(ssl.MemoryBIO(), outgoing, server_hostname=name).do_handshake()
        return outgoing.read()

    def test_a_client_hello_in_pieces(self):
        client = self.visitor("-3", self.extcert())
        self.assertEqual(client.code("AUTH TLS"), 234)
        incoming, outgoing = ssl.MemoryBIO(), ssl.MemoryBIO()
        tls = client.context.wrap_bio(incoming, outgoing, server_hostname="a.example")
        other = self.visitor("-3", self.extcert())
        while True:
            try:
                tls.do_handshake()
                break
            except ssl.SSLWantReadError:
                data = outgoing.read()
                cuts = [0, 1, 4, 5, 6, 60, len(data) - 1, len(data)]
                for start, end in zip(cuts, cuts[1:]):
                    client.sock.sendall(data[start:end])
                    self.assertEqual(other.code("NOOP"), 200)           # SERVER has had a look at each piece
                incoming.write(client.sock.recv(65536))
        self.assertEqual(tls.getpeercert(True), self.der(os.path.join(self.extcert(), "a.example.pem")))

    def test_nonsense_instead_of_a_client_hello(self):
        for switches in ((), ("-3", self.extcert())):
            with self.subTest(switches=switches):
                client = self.visitor(*switches)
                self.assertEqual(client.code("AUTH TLS"), 234)
                client.send(b"USER alice\r\n")
                self.assertNotIn(b"331", self.rest(client))
                self.daemon(*switches).wait_for("TLS handshake failed")

    def test_a_client_hello_that_breaks_off(self):
        """SERVER gets no rest, however often it is woken: it must not listen for ever, nor without a pause."""
        for start in (b"", b"\x16", self.client_hello("a.example")[:50]):
            client = self.visitor("-3", self.extcert())
            self.assertEqual(client.code("AUTH TLS"), 234)
            client.send(start)
            client.sock.shutdown(socket.SHUT_WR)
            self.assertTrue(client.at_end(), client.exchange())

    def test_no_client_hello_in_time(self):
        patches = "pureftpd.LOGIN_SECONDS = pureftpd.HANDSHAKE_SECONDS = 0.3"
        for start in (b"", b"\x16\x03", self.client_hello("a.example")[:50]):
            for switches in ((), ("-3", self.extcert())):
                client = self.visitor(*switches, patches=patches)
                self.assertEqual(client.code("AUTH TLS"), 234)
                client.send(start)
                self.assertIn(self.rest(client)[:3], (b"", b"421"))
        server = self.daemon("-3", self.extcert(), patches=patches)
        for pid, _ in processes_below(server.process.pid):              # SERVER: all of its life without a spinning loop
            with open("/proc/%d/stat" % pid) as file:
                user, system = file.read().rpartition(")")[2].split()[11:13]
            self.assertLess((int(user) + int(system)) / os.sysconf("SC_CLK_TCK"), 0.5)

    def test_nobody_logs_in_in_time(self):
        client = self.visitor(patches="pureftpd.LOGIN_SECONDS = pureftpd.HANDSHAKE_SECONDS = 0.3")
        client.secure()
        self.assertEqual(client.reply()[0], 421)
        self.assertTrue(client.at_end())                    # with close_notify: anything else is an error here

    def test_the_end_of_the_control_connection_is_announced(self):
        client = self.secured()
        self.assertEqual(client.code("QUIT"), 221)
        self.assertEqual(client.sock.recv(1), b"")
        client.sock.unwrap()

    def test_a_self_signed_certificate_on_a_full_disk(self):
        def run(command, **_):
            for path in command:                            # as openssl(1) does there
                if path.endswith((".new", ".crt")):
                    open(path, "w").close()
            return mock.Mock(returncode=0)

        path = os.path.join(self.place, "full.pem")
        with mock.patch.object(subprocess, "run", run), self.assertRaisesRegex(pureftpd.ConfigError, "full.pem: No space left"):
            pureftpd.certificate_make(mock.Mock(certfile=(path, path)), Lines())
        self.assertFalse(os.path.exists(path))
        pureftpd.certificate_make(mock.Mock(certfile=(path, path)), mock.Mock())
        self.assertTrue(os.path.getsize(path))

    # As it is with files that were just written, with old ones, and where Python gives no way to set ticket keys.
    WAYS = "", "pureftpd.FRESH_SECONDS = 0", "pureftpd.libssl_load = lambda: None"

    def test_renewed_certificates_serve_the_next_client(self):
        for number, patches in enumerate(self.WAYS):
            with self.subTest(patches):
                self.check_renewal("renewed%d" % number, patches)

    def check_renewal(self, name, patches):
        path = self.make_certificate(name)
        old, switches = self.der(path), ("-Y", "1", "-2", path, "-E")

        def seen():
            client = TlsClient(self.server(*switches, patches=patches).connect())
            self.addCleanup(client.close)
            client.reply()
            client.secure()
            self.assertEqual(client.code("NOOP"), 200)
            return client.sock.getpeercert(True)

        self.assertEqual(seen(), old)
        self.make_certificate(name)
        new = self.der(path)
        self.assertNotEqual(new, old)
        self.assertEqual(seen(), new)
        with open(path, "w") as file:
            file.write("-----BEGIN NONSENSE-----")
        self.assertEqual((seen(), seen()), (new, new))
        server = self.server(*switches, patches=patches)
        server.wait_for("ERROR.*the old one stays in use")
        self.assertEqual(sum("stays in use" in line for line in server.lines), 1)
        os.unlink(path)
        self.assertEqual(seen(), new)
        self.make_certificate(name)
        self.assertEqual(seen(), self.der(path))
        with open(path, "w") as file:
            file.write("-----BEGIN NONSENSE-----")
        seen()
        self.until(lambda: sum("stays in use" in line for line in server.lines) == 2, "no second complaint")

    def test_a_certificate_that_ends_soon_is_told(self):
        path = self.make_certificate("soon", days="13")
        ends = openssl("x509", "-enddate", "-noout", "-in", path).decode().strip().partition("=")[2]
        stamp = time.strftime("%Y-%m-%d at %H:%M", time.gmtime(ssl.cert_time_to_seconds(ends)))
        self.server("-Y", "1", "-2", path).wait_for(r"WARNING\].*soon.pem ends on " + stamp)
        self.assertFalse([line for line in self.daemon().lines if " ends on " in line])

    def test_a_certificate_of_its_own_making(self):
        path = os.path.join(self.place, "new", "made.pem")
        server = self.server("-Y", "1", "-2", path, "--tlsselfsigned", "-E")
        server.wait_for("WARNING.*Made a self-signed certificate.*made.pem")
        self.assertEqual(os.stat(path).st_mode & 0o777, 0o600)
        self.assertEqual(os.listdir(os.path.dirname(path)), ["made.pem"])
        client = TlsClient(server.connect())
        self.addCleanup(client.close)
        client.reply()
        client.secure()
        self.assertEqual(client.sock.getpeercert(True), self.der(path))

    def test_the_key_that_is_there_is_used_for_it(self):
        log = types.SimpleNamespace(warning=lambda text: None)
        crt, key = os.path.join(self.place, "own.crt"), os.path.join(self.place, "own.key")
        openssl("genpkey", "-algorithm", "EC", "-pkeyopt", "ec_paramgen_curve:prime256v1", "-out", key)
        with open(key) as file:
            before = file.read()
        pureftpd.certificate_make(types.SimpleNamespace(certfile=(crt, key)), log)
        with open(key) as file:
            self.assertEqual(file.read(), before)
        ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER).load_cert_chain(crt, key)

    def test_no_start_without_a_certificate(self):
        nowhere, no_key, locked = (os.path.join(self.place, name) for name in ("nowhere.pem", "no_key.pem", "locked.pem"))
        with open(self.certificate) as file:
            text = file.read()
        with open(no_key, "w") as file:
            file.write(text[text.index("-----BEGIN CERT"):])
        openssl("pkey", "-in", self.certificate, "-aes128", "-passout", "pass:secret", "-out", locked)
        for switches, told in ((("-Y", "1", "-2", nowhere), "nowhere.pem: No such file.*; make one with --tlsselfsigned"),
                               (("-Y", "1", "-2", no_key), "no_key.pem: there is no private key in it; give the right file"),
                               (("-Y", "1", "-2", no_key + "," + locked), "locked.pem: the key has a passphrase"),
                               (("-Y", "1", "-2", locked), "locked.pem: there is no certificate in it"),
                               (("-Y", "1", "-2", self.certificate, "-J", "BOGUS"), "-J BOGUS: no cipher"),
                               (("-Y", "1", "-2", self.certificate, "-3", nowhere), "-3 .*nowhere.pem: No such file"),
                               (("--tlsbind", "990"), "-Y")):
            with self.assertRaises(AssertionError) as caught:
                self.server(*switches)
            self.assertRegex(str(caught.exception), told)

    def test_certificates_by_host_name_are_looked_at(self):
        directory = os.path.join(self.place, "looked_at")
        os.mkdir(directory)
        self.make_certificate("soon", days="13", path=os.path.join(directory, "soon.example.pem"))
        with open(os.path.join(directory, "junk.example.pem"), "w") as file:
            file.write("junk")
        server = self.daemon("-3", directory)
        server.wait_for("WARNING.*soon.example.pem ends on ")
        server.wait_for("ERROR.*junk.example.pem: there is no certificate in it")

    @unittest.skipUnless(hasattr(socket, "AF_UNIX"), "needs Unix sockets")
    def test_back_ends_learn_the_host_name(self):
        path, asked = os.path.join(self.place, "auth.sock"), []
        with socket.socket(socket.AF_UNIX) as listener:
            listener.bind(path)
            os.chmod(path, 0o666)
            listener.listen()
            listener.settimeout(EXAM_SECONDS)

            def answer():
                sock, _ = listener.accept()
                with sock:
                    while not asked or not asked[-1].endswith("end\n"):
                        asked.append((asked[-1] if asked else "") + sock.recv(4096).decode())
                    sock.sendall(b"auth_ok:1\nuid:%d\ngid:%d\ndir:%s/./\nend\n" % (EXAM_UID, EXAM_UID, os.fsencode(self.home)))

            thread = threading.Thread(target=answer)
            thread.start()
            try:
                client = TlsClient(self.server("-Y", "1", "-2", self.certificate, "-E", "-l", "extauth:" + path).connect())
                self.addCleanup(client.close)
                client.reply()
                client.secure("ftp.example")
                self.assertEqual(client.login("carol"), 230, client.exchange())
            finally:
                thread.join()
        self.assertIn("sni_name:ftp.example\n", asked[-1])
        self.assertIn("encrypted:1\n", asked[-1])


class TlsTransfers(TlsExam):
    """Data connections under PROT P."""

    SIZE = 32 << 20

    def content_of(self, size):
        return hashlib.sha256(b"x").digest() * (size // 32) + b"the end"

    def test_both_ways_whole(self):
        data = self.content_of(self.SIZE)
        self.put("big", data)
        for patches in ("", "pureftpd.libssl_load = lambda: None"):
            client = self.secured(patches=patches)
            code, _, got = self.fetch(client, "RETR big")
            self.assertEqual((code, got == data), (226, True))
            self.assertEqual(self.store(client, "STOR up", data)[0], 226)
            self.assertTrue(self.content("up") == data)

    def test_a_file_that_becomes_shorter_while_it_is_sent(self):
        path = self.put("file")
        for patches in ("", "pureftpd.libssl_load = lambda: None"):
            os.truncate(path, 64 << 20)
            client = self.secured(patches=patches)
            with client.data(polite=False) as data:
                self.assertEqual(client.code("RETR file"), 150)
                data.recv(1000)
                os.truncate(path, 32 << 20)
                with self.assertRaises(ssl.SSLError):                           # there is no close_notify
                    while data.recv(1 << 20):
                        pass
            self.assertEqual(client.reply()[0], 451, client.exchange())

    def test_a_data_connection_that_is_reset_before_its_handshake(self):
        self.put("file", b"x")
        client = self.secured()
        reset(client.data().sock)
        code = client.code("RETR file")
        self.assertIn(code if code != 150 else client.reply()[0], (425, 426), client.exchange())

    def test_large_files_go_out_in_large_pieces(self):
        if libssl_here() is None:
            self.skipTest("this Python gives no way to gather records")
        patches = """
def told(self, outbox, empty=pureftpd.TlsStream.empty):
    pureftpd.os.write(2, b"gathered: %d\\n" % len(outbox.waiting()))
    empty(self, outbox)
pureftpd.TlsStream.empty = told
"""
        client, server, data = self.secured(patches=patches), self.daemon(patches=patches), os.urandom((3 << 20) + 1)
        self.put("x", data)
        code, _, got = self.fetch(client, "RETR x")
        self.assertEqual((code, got == data), (226, True))
        def pieces():
            return [int(size) for size in re.findall(r"gathered: (\d+)", "\n".join(server.lines))]
        self.until(lambda: sum(pieces()) > len(data), "the last piece")
        self.assertGreater(min(pieces()[:-1]), pureftpd.TLS_GATHERED - 65536, pieces())

    def test_whole_segments(self):
        stream = pureftpd.TlsStream.__new__(pureftpd.TlsStream)
        for segment in (536, 1440, 1448, 8948, 32768, 65483, 1 << 20):
            stream.sock = mock.Mock(getsockopt=lambda *_, segment=segment: segment)
            size = stream.whole_segments()
            sent = size + -(-size // 16384) * 22
            self.assertEqual((sent % segment, max(pureftpd.TLS_GATHERED, segment) - segment < sent), (0, True), segment)

    def test_records_gather_until_they_are_sent(self):
        libssl = libssl_here()
        if libssl is None:
            self.skipTest("this Python gives no way to gather records")
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        context.load_cert_chain(self.certificate)
        context.num_tickets = 0
        for version in (ssl.TLSVersion.TLSv1_2, ssl.TLSVersion.TLSv1_3):
            with self.subTest(version), contextlib.ExitStack() as stack:
                ours, theirs = (stack.enter_context(sock) for sock in socket.socketpair())
                ours.setblocking(False)
                server = stack.enter_context(context.wrap_socket(ours, server_side=True, do_handshake_on_connect=False))
                client = stack.enter_context(client_context(maximum_version=version).wrap_socket(
                    deadline_socket(theirs), do_handshake_on_connect=False))
                shaking = threading.Thread(target=client.do_handshake)
                shaking.start()
                self.again(server, server.do_handshake)
                shaking.join()
                self.check_outbox(libssl, server, client)

    def again(self, sock, action):
        """action() on a non-blocking TLS connection."""
        while True:
            try:
                return action()
            except ssl.SSLWantReadError:
                self.assertTrue(select.select([sock], [], [], EXAM_SECONDS)[0], "nothing came")

    def check_outbox(self, libssl, server, client):
        data = os.urandom(30000)
        with contextlib.closing(pureftpd.Outbox(libssl, server, 20000)) as outbox:
            with self.assertRaises(ssl.SSLWantWriteError):
                server.send(data)
            sent = bytes(outbox.waiting())
            self.assertEqual(len(sent), 20000)
            outbox.taken(15000)
            self.assertEqual(outbox.waiting(), sent[15000:])
            outbox.taken(5000)
            self.assertEqual(len(outbox.waiting()), 0)
            self.assertEqual(server.send(data), len(data))              # the same again, as OpenSSL wants it
            sent += bytes(outbox.waiting())
            self.assertTrue(30000 < len(sent) < 30200, len(sent))
            self.assertEqual(select.select([client], [], [], 0)[0], [])
            outbox.taken(len(outbox.waiting()))
        os.write(server.fileno(), sent)
        self.assertEqual(server.send(b"directly"), 8)
        got = b""
        while len(got) < 30008:
            got += client.recv(30008)
        self.assertTrue(got == data + b"directly")
        for _ in range(200):                                            # each lets go of all it has
            pureftpd.Outbox(libssl, server, 1 << 20).close()
        self.assertEqual(server.send(b"still"), 5)
        self.assertEqual(client.recv(100), b"still")

    def test_a_slow_reader_gets_all_of_it(self):
        data = os.urandom(16 << 20)
        self.put("x", data)
        for version in (ssl.TLSVersion.TLSv1_2, ssl.TLSVersion.TLSv1_3):
            client = self.secured(context=client_context(maximum_version=version))
            with client.data() as sock:
                self.assertEqual(client.code("RETR x"), 150)
                got = bytearray(sock.recv(5000))
                self.assertEqual(client.code("STAT"), 213)
                for piece in iter(lambda: sock.recv(5000), b""):
                    got += piece
            self.assertEqual((client.reply()[0], got == data), (226, True))

    def test_small_files_do_not_wait_for_an_acknowledgement(self):
        patches = """
def told(self, data, send=pureftpd.TlsStream.send):
    pureftpd.os.write(2, b"at once: %d\\n" % self.sock.getsockopt(pureftpd.socket.IPPROTO_TCP, pureftpd.socket.TCP_NODELAY))
    send(self, data)
pureftpd.TlsStream.send = told
"""
        client, server = self.secured(patches=patches), self.daemon(patches=patches)
        for size, shown in ((1000, "1"), (1 << 20, "0")):
            self.put("x", bytes(size))
            self.assertEqual(self.fetch(client, "RETR x")[::2], (226, bytes(size)))
            server.wait_for("at once: " + shown)

    @unittest.skipUnless(hasattr(socket, "TCP_QUICKACK"), "needs Linux")
    def test_the_beginning_of_an_upload_is_acknowledged_at_once(self):
        patches = """
def told(self, buffer, receive=pureftpd.TlsStream.receive_into):
    pureftpd.os.write(2, b"quick: %d\\n" % self.sock.getsockopt(pureftpd.socket.IPPROTO_TCP, pureftpd.socket.TCP_QUICKACK))
    return receive(self, buffer)
pureftpd.TlsStream.receive_into = told
"""
        client, server = self.secured(patches=patches), self.daemon(patches=patches)
        self.assertEqual(self.store(client, "STOR x", b"data")[0], 226)
        self.assertEqual(server.wait_for(r"quick: (\d)").group(1), "1")

    def test_tls_1_2_too(self):
        context = client_context(maximum_version=ssl.TLSVersion.TLSv1_2)
        client, data = self.secured(context=context), self.content_of(1 << 20)
        self.assertEqual(client.sock.version(), "TLSv1.2")
        for client.resume in (False, True):
            self.assertEqual(self.store(client, "STOR up", data)[0], 226)
            self.assertEqual(self.fetch(client, "RETR up")[::2], (226, data))

    def test_active_connections(self):
        client = self.secured()
        self.put("x", b"active")
        listener = client.active()
        with listener:
            client.send(b"RETR x\r\n")
            sock = deadline_socket(listener.accept()[0])
            with TlsData(client, sock) as data:
                self.assertEqual(client.reply()[0], 150)
                self.assertEqual(data.recv(100), b"active")
                self.assertEqual(data.recv(100), b"")
            self.assertEqual(client.reply()[0], 226)

    def test_files_of_every_size(self):
        client = self.secured()
        for size in (0, 1, 16383, 16384, 16385, (1 << 18) - 1, 1 << 18, (1 << 18) + 1, 1 << 20, (1 << 20) + 1):
            data = os.urandom(size)
            self.assertEqual(self.store(client, "STOR x", data)[0], 226)
            self.assertEqual(self.content("x"), data)
            self.assertEqual(self.fetch(client, "RETR x")[::2], (226, data))

    def test_offsets_appending_and_ascii(self):
        client = self.secured()
        self.put("x", b"0123456789")
        self.assertEqual(client.code("REST 4"), 350)
        self.assertEqual(self.fetch(client, "RETR x")[::2], (226, b"456789"))
        self.assertEqual(client.code("REST 8"), 350)
        self.assertEqual(self.store(client, "STOR x", b"abc")[0], 226)
        self.assertEqual(self.store(client, "APPE x", b"def")[0], 226)
        self.assertEqual(self.content("x"), b"01234567abcdef")
        self.assertEqual(client.code("TYPE A"), 200)
        self.assertEqual(self.store(client, "STOR text", b"one\r\ntwo\r\n")[0], 226)
        self.assertEqual(self.content("text"), b"one\ntwo\n")
        self.assertEqual(self.fetch(client, "RETR text")[::2], (226, b"one\r\ntwo\r\n"))

    def test_listings(self):
        client = self.secured()
        for number in range(600):
            self.put("file%04d" % number)
        code, _, names = self.fetch(client, "NLST")
        self.assertEqual((code, names.count(b"file")), (226, 600))
        for command in ("LIST", "MLSD"):
            code, _, lines = self.fetch(client, command)
            self.assertEqual((code, lines.count(b"file0")), (226, 600), command)
        self.assertEqual(client.say("STAT .")[1].count(b"file02"), 100)

    def cut_off(self, sock):
        """End a TLS connection as somebody on the way would: without close_notify."""
        plain = socket.socket(fileno=sock.detach())
        plain.close()

    def upload_cut_off(self, *switches):
        """(code, last line) for an upload of `new content` over `old` that is not closed properly."""
        client = self.secured(*switches)
        self.put("x", b"old")
        data = client.data()
        self.assertEqual(client.code("STOR x"), 150)
        data.sendall(b"new content")
        self.cut_off(data.secured())
        return client.reply()

    def test_an_upload_without_an_end_is_not_complete(self):
        switches = "-c", "49"                               # a server of its own
        server = self.daemon(*switches)
        for _ in range(2):
            before = len(server.lines)
            code, text = self.upload_cut_off(*switches)
            self.assertIn(code, (426, 451), text)
            self.until(lambda: any(re.search(r"\(alice@.* uploaded .*incomplete", line) for line in server.lines[before:]), "no line")
            self.assertEqual(sum("close_notify" in line for line in server.lines[before:]), 1)

    def test_an_upload_without_an_end_is_not_published(self):
        code, text = self.upload_cut_off("-0")
        self.assertIn(code, (426, 451), text)
        self.assertEqual((self.content("x"), os.listdir(self.home)), (b"old", ["x"]))

    def test_an_upload_without_an_end_where_that_is_good_enough(self):
        self.assertEqual(self.upload_cut_off("--tlslooseclose")[0], 226)
        self.assertEqual(self.content("x"), b"new content")

    def test_a_client_that_resets(self):
        client = self.secured()
        self.put("big", b"", base=self.home)
        os.truncate(os.path.join(self.home, "big"), 1 << 30)
        for command in ("RETR big", "STOR up"):
            data = client.data()
            self.assertEqual(client.code(command), 150)
            if command == "RETR big":
                data.recv(1000)
            else:
                data.sendall(bytes(1 << 20))
            data.sock = data.secured()
            data.sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("@ii", 1, 0))
            self.cut_off(data.sock)
            self.assertEqual(client.reply()[0], 426, client.exchange())
        self.assertEqual(client.code("NOOP"), 200)

    def test_a_data_connection_without_a_handshake(self):
        client = self.secured()
        self.put("x", b"secret")
        for nonsense in (b"GET / HTTP/1.0\r\n\r\n", b""):
            sock = client.data().sock
            self.assertEqual(client.code("RETR x"), 150)
            with sock:
                sock.sendall(nonsense)
                with contextlib.suppress(OSError):                  # when the server was faster and has closed
                    sock.shutdown(socket.SHUT_WR)
                self.assertEqual(client.reply()[0], 426, client.exchange())
        self.assertEqual(self.fetch(client, "RETR x")[::2], (226, b"secret"))

    def test_abort_of_a_download(self):
        client = self.secured()
        os.truncate(self.put("big"), 1 << 30)
        data = client.data()
        self.assertEqual(client.code("RETR big"), 150)
        data.recv(1000)
        self.assertEqual(client.code("ABOR"), 426)
        self.assertEqual(client.reply()[0], 226)
        with data, self.assertRaises((ssl.SSLError, ConnectionError)):      # no end is announced that is none
            while data.recv(1 << 20):
                pass
            self.fail("a proper end")
        self.assertEqual(client.code("NOOP"), 200)

    def test_abort_of_an_upload(self):
        client = self.secured()
        with client.data() as data:
            self.assertEqual(client.code("STOR up"), 150)
            data.sendall(bytes(100000))
            self.until(lambda: b"100000 bytes" in client.say("STAT")[1], "the upload does not begin")
            self.assertEqual(client.code("ABOR"), 426)
            self.assertEqual(client.reply()[0], 451)
        self.assertEqual(client.code("NOOP"), 200)

    def test_abort_before_the_handshake(self):
        client = self.secured()
        self.put("x", b"data")
        with client.data().sock:
            self.assertEqual(client.code("RETR x"), 150)
            self.assertEqual(client.code("ABOR"), 426)
            self.assertEqual(client.reply()[0], 226)
        self.assertEqual(client.code("NOOP"), 200)

    def test_status_during_transfers(self):
        client = self.secured()
        os.truncate(self.put("big"), 1 << 30)
        with client.data(polite=False) as data:
            self.assertEqual(client.code("RETR big"), 150)
            data.recv(1000)
            self.assertEqual(client.code("STAT"), 213)
        self.assertEqual(client.reply()[0], 426)
        with client.data() as data:
            self.assertEqual(client.code("STOR up"), 150)
            data.sendall(b"part")
            self.assertEqual(client.code("STAT"), 213)
            data.sendall(b" rest")
        self.assertEqual(client.reply()[0], 226)
        self.assertEqual(self.content("up"), b"part rest")


class TlsResumption(TlsExam):
    """TLSSessionReuse, and that tickets are good for one login only."""

    def resumed(self, client):
        """Whether a download resumes the session of the control connection; the code when it is refused."""
        with client.data() as data:
            self.assertEqual(client.code("RETR x"), 150)
            with contextlib.suppress(OSError):
                while data.recv(100):
                    pass
        code = client.reply()[0]
        return code if code != 226 else bool(data.reused)

    def test_data_connections_resume_the_control_connection(self):
        for version in (ssl.TLSVersion.TLSv1_2, ssl.TLSVersion.TLSv1_3):
            client = self.secured(context=client_context(minimum_version=version, maximum_version=version))
            self.put("x", b"data")
            self.assertEqual([self.resumed(client) for _ in range(3)], [True] * 3, version)

    def test_auto_holds_a_client_to_what_it_has_done(self):
        client = self.secured()
        self.put("x", b"data")
        client.resume = False
        self.assertIs(self.resumed(client), False)
        client.resume = True
        self.assertIs(self.resumed(client), True)
        client.resume = False
        self.assertEqual(self.resumed(client), 522)
        client.resume = True
        self.assertIs(self.resumed(client), True)

    def test_auto_does_so_after_uploads_too(self):
        if not self.with_libssl().new_ticket:
            self.skipTest("needs OpenSSL 3.0")
        client = self.secured()
        self.put("x", b"data")
        self.assertEqual(self.store(client, "STOR y", b"more")[0], 226)     # which resumes, and gets no ticket
        client.resume = False
        self.assertEqual(self.resumed(client), 522)

    def test_on_and_off(self):
        self.put("x", b"data")
        client = self.secured("--tlssessionreuse", "on")
        client.resume = False
        self.assertEqual(self.resumed(client), 522)
        self.daemon("--tlssessionreuse", "on").wait_for("WARNING.*did not resume the TLS session of its login")
        client.resume = True
        self.assertIs(self.resumed(client), True)
        client = self.secured("--tlssessionreuse", "off")
        for client.resume in (True, False):
            self.assertIs(self.resumed(client), client.resume)

    def with_libssl(self):
        libssl = libssl_here()
        if libssl is None:
            self.skipTest("this Python gives no way to hand sessions over")
        return libssl

    def test_a_session_is_resumed_by_its_id(self):
        """By clients that know no tickets (RFC 5246, F.1.4); only by the login that it belongs to."""
        self.with_libssl()
        context = client_context(maximum_version=ssl.TLSVersion.TLSv1_2)
        context.options |= ssl.OP_NO_TICKET
        self.put("x", b"data")
        first, second = (self.secured("--tlssessionreuse", "on", context=context) for _ in range(2))
        self.assertFalse(first.sock.session.has_ticket)
        for _ in range(2):
            self.assertEqual(self.store(first, "STOR y", b"more")[0], 226)
            self.assertIs(self.resumed(first), True)
        with second.data() as data:
            self.assertEqual(second.code("RETR x"), 150)
            data.tls = context.wrap_socket(data.sock, session=first.sock.session, suppress_ragged_eofs=False)
            self.assertFalse(data.tls.session_reused)
            self.assertEqual(second.reply()[0], 522)

    def test_a_ticket_for_each_transfer(self):
        if not self.with_libssl().new_ticket:
            self.skipTest("needs OpenSSL 3.0")
        context = client_context(minimum_version=ssl.TLSVersion.TLSv1_3)
        for reuse, fresh in (("on", True), ("auto", True), ("off", False)):
            client = self.secured("--tlssessionreuse", reuse, context=context)
            seen = [client.sock.session.id]
            for _ in range(3):
                self.assertEqual(self.store(client, "STOR y", b"more")[0], 226)
                seen.append(client.sock.session.id)
            self.assertEqual(len(set(seen)), len(seen) if fresh else 1, reuse)
            self.assertEqual(client.code("CCC"), 200)
            client.sock = client.sock.unwrap()
            self.assertEqual(client.code("ABOR"), 226)          # in the clear there is nothing to send a ticket with

    def test_sessions_that_are_nonsense(self):
        libssl = self.with_libssl()
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        for data in (b"x", b"\x30\x00", bytes(1000), b"\x30\x82\xff\xff" + bytes(100)):
            self.assertFalse(libssl.session_import(context, data))

    def test_another_logins_ticket_opens_nothing(self):
        for version in (ssl.TLSVersion.TLSv1_2, ssl.TLSVersion.TLSv1_3):
            for patches in TlsHandshakes.WAYS:
                with self.subTest(version, patches=patches):
                    self.check_tickets(client_context(minimum_version=version, maximum_version=version), patches)

    def check_tickets(self, context, patches):
        how = {"context": context, "patches": patches}
        first = self.secured("--tlssessionreuse", "on", **how)
        session = first.sock.session
        self.assertTrue(session.has_ticket)
        again = self.visitor("--tlssessionreuse", "on", **how)
        again.secure(session=session)
        self.assertFalse(again.sock.session_reused)
        self.assertEqual(again.login(), 230)
        again.protect()
        self.put("x", b"data")
        with again.data() as data:
            self.assertEqual(again.code("RETR x"), 150)
            data.tls = context.wrap_socket(data.sock, session=session, suppress_ragged_eofs=False)
            self.assertFalse(data.tls.session_reused)
            self.assertEqual(again.reply()[0], 522)
        self.assertIs(self.resumed(again), True)


def libssl_here():
    """LibSSL or None. Its trial forks, of which Python warns where tests before have left threads."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)
        return pureftpd.libssl_load()


class TlsContexts(TlsExam):
    """What PRIV keeps of certificates, and what it hands out."""

    def certificates(self, before=None, **options):
        log = types.SimpleNamespace(warning=lambda text: None, error=lambda text: None)
        values = {"certfile": (self.certificate,) * 2, "extcert": None, "tlsminversion": "1.2", "tlsciphersuite": None}
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", DeprecationWarning)                     # see libssl_here()
            found = pureftpd.Certificates(types.SimpleNamespace(**{**values, **options}), log, before)
        self.addCleanup(found.close)
        if found.libssl is None:
            self.skipTest("this Python gives no way to set ticket keys")
        return found

    def patch(self, name, value):
        self.addCleanup(setattr, pureftpd, name, getattr(pureftpd, name))
        setattr(pureftpd, name, value)

    def test_a_context_is_made_once_and_ticket_keys_for_each(self):
        self.patch("FRESH_SECONDS", 0)
        certificates = self.certificates()
        first, second = certificates.of_client(b""), certificates.of_client(b"")
        self.assertIs(first.context, second.context)
        self.assertEqual((len(first.ticket_keys), len(second.ticket_keys)), (80, 80))
        self.assertNotEqual(first.ticket_keys, second.ticket_keys)
        os.utime(self.certificate)
        self.assertIsNot(certificates.of_client(b"").context, first.context)

    def test_a_file_changed_just_now_is_read_again(self):
        self.patch("FRESH_SECONDS", 3600)
        certificates = self.certificates()
        self.assertIsNot(certificates.of_client(b"").context, certificates.of_client(b"").context)

    def test_ticket_keys_are_those_that_were_set(self):
        certificates = self.certificates()
        tls = certificates.of_client(b"")
        wanted = bytes(bytearray(tls.ticket_keys))
        tls.put_keys()
        self.assertEqual(tls.libssl.ticket_keys(tls.context), wanted)
        self.assertEqual(tls.ticket_keys, bytes(80))                    # wiped

    def test_a_client_without_its_keys_is_not_served(self):
        certificates = self.certificates()
        with self.assertRaises(OSError):
            certificates.of_client(b"")._replace(ticket_keys=b"short").put_keys()

    def test_a_broken_certificate_of_a_host_survives_a_new_configuration(self):
        directory = os.path.join(self.place, "survives")
        os.mkdir(directory)
        path = self.make_certificate("host", path=os.path.join(directory, "host.pem"))
        before = self.certificates(extcert=directory)
        before.of_client(b"host")
        with open(path, "w") as file:
            file.write("nonsense")
        after = self.certificates(extcert=directory, before=before)
        before.close()
        self.assertIsNotNone(after.context_ready((path, path)))

    def test_what_changes_while_it_is_read_is_not_kept_as_good(self):
        path = self.make_certificate("changing")
        certificates = self.certificates(certfile=(path, path))
        good = [os.pread(fd, 1 << 20, 0) for fd in certificates.good[path, path]]
        make = pureftpd.tls_context

        def change_afterwards(*args):
            context = make(*args)
            self.make_certificate("changing")
            return context

        self.make_certificate("changing")
        self.patch("tls_context", change_afterwards)
        self.assertIsNotNone(certificates.of_client(b"").context)
        self.assertEqual([os.pread(fd, 1 << 20, 0) for fd in certificates.good[path, path]], good)

    def test_few_host_names_are_kept(self):
        self.patch("FRESH_SECONDS", 0)
        self.patch("CONTEXTS_MAX", 2)
        directory = os.path.join(self.place, "few")
        os.mkdir(directory)
        for name in ("a", "b", "c"):
            self.make_certificate(name, path=os.path.join(directory, name + ".pem"))
        certificates = self.certificates(extcert=directory)
        a = certificates.of_client(b"a").context
        certificates.of_client(b"b")
        self.assertIs(certificates.of_client(b"a").context, a)
        c = certificates.of_client(b"c").context
        self.assertEqual([context for _, context in certificates.contexts.values()], [a, c])


class MemoryScrub(unittest.TestCase):
    """memory_scrub(), in a process of its own."""

    def test_it_costs_the_same_however_often(self):
        program = """
import pureftpd
def size():
    with open("/proc/self/statm") as file:
        return int(file.read().split()[0])
for _ in range(10):
    pureftpd.memory_scrub()
before = size()
for _ in range(50):
    pureftpd.memory_scrub()
    keep = [bytes(n) for n in range(600, 700)]
print(size() - before)
"""
        if not os.path.exists("/proc/self/statm"):
            self.skipTest("needs Linux's /proc")
        made = subprocess.run([sys.executable, "-c", program], cwd=HERE, stdout=subprocess.PIPE, check=True)
        self.assertLessEqual(int(made.stdout), 16)              # pages


class TlsPrograms(TlsExam):
    """What people use."""

    def run_client(self, *words, feed=b"", code=0):
        made = subprocess.run(words, input=feed, stdout=subprocess.PIPE, stderr=subprocess.PIPE, timeout=EXAM_SECONDS,
                              env=dict(os.environ, HOME=self.place), cwd=self.place, check=False)
        self.assertEqual(made.returncode, code, made.stdout + made.stderr)
        return made.stdout

    def program(self, name):
        path = shutil.which(name)
        if not path:
            self.skipTest("%s is not installed" % name)
        return path

    def url(self, path, *switches):
        return "ftp://localhost:%d/%s" % (self.daemon(*switches).port, path)

    CURL = "-sS", "-k", "--ssl-reqd", "-4", "-u", "alice:secret"

    def test_curl(self):
        curl = self.program("curl")
        self.put("down", b"d" * 500000)
        source = os.path.join(self.place, "source")
        with open(source, "wb") as file:
            file.write(b"s" * 500000)
        for reuse in ("off", "auto", "on"):
            switches = "--tlssessionreuse", reuse
            self.assertEqual(self.run_client(curl, *self.CURL, self.url("down", *switches)), b"d" * 500000)
            self.run_client(curl, *self.CURL, "-T", source, self.url("up", *switches))
            self.assertEqual(self.content("up"), b"s" * 500000)
            self.assertIn(b" down", self.run_client(curl, *self.CURL, self.url("", *switches)))

    def test_curl_uploads_are_whole(self):
        curl, source = self.program("curl"), os.path.join(self.place, "source")
        with open(source, "wb") as file:
            file.write(os.urandom(500000))
        for words in (["--tlsv1.3"], ["--tls-max", "1.2"]):
            for number in range(10):
                words += ["-T", source, self.url("up%d" % number)]
            self.run_client(curl, *self.CURL, *words)
            with open(source, "rb") as file:
                wanted = file.read()
            for number in range(10):
                self.assertEqual(self.content("up%d" % number), wanted)

    def test_curl_does_many_things_in_one_login(self):
        """It uses each ticket of TLS 1.3 once."""
        curl, source = self.program("curl"), os.path.join(self.place, "source")
        self.put("down", b"d" * 500000)
        with open(source, "wb") as file:
            file.write(b"s" * 1000)
        libssl = libssl_here()
        for version, reuse in ((["--tlsv1.3"], "auto"), (["--tlsv1.3"], "on"), (["--tls-max", "1.2"], "on")):
            switches = "--tlssessionreuse", reuse               # up to 1.2 curl knows no tickets
            words = ["-T", source, self.url("up", *switches)] * 2 if reuse != "on" or libssl and libssl.new_ticket else []
            words += [self.url("down", *switches), "-o", "got", self.url("", *switches), "-o", "listing"]
            if reuse != "on" or libssl:
                self.run_client(curl, *self.CURL, *version, *words)

    def test_lftp(self):
        lftp = self.program("lftp")
        self.put("down", b"d" * 500000)
        for reuse in ("off", "auto", "on"):
            local = os.path.join(self.place, "got." + reuse)
            port = self.daemon("--tlssessionreuse", reuse).port
            self.run_client(lftp, "-c", "set ssl:verify-certificate no; set ftp:ssl-force yes; set ftp:ssl-protect-data yes; "
                            "set net:max-retries 1; set net:timeout 10; open -u alice,secret -p %d 127.0.0.1; "
                            "get down -o %s; put %s -o up; ls" % (port, local, local))
            self.assertEqual(self.content("up"), b"d" * 500000)

    def test_wget(self):
        wget = self.program("wget")
        if b"+ssl" not in self.run_client(wget, "--version"):
            self.skipTest("this wget has no TLS")
        self.put("down", b"d" * 500000)
        made = self.run_client(wget, "-q", "-O", "-", "--no-check-certificate", "--user=alice", "--password=secret",
                               "ftps://127.0.0.1:%d/down" % self.daemon().port)
        self.assertEqual(made, b"d" * 500000)

    def test_ftplib(self):
        """It never resumes a session."""
        for reuse, welcome in (("off", True), ("auto", True), ("on", False)):
            client = ftplib.FTP_TLS(context=client_context(), timeout=EXAM_SECONDS)
            self.addCleanup(client.close)
            client.connect("127.0.0.1", self.daemon("--tlssessionreuse", reuse).port)
            client.login("alice", "secret")
            client.prot_p()
            if welcome:
                with open(os.path.join(self.place, "up"), "w+b") as file:
                    file.write(b"u" * 500000)
                    file.seek(0)
                    client.storbinary("STOR up", file)
                got = []
                client.retrbinary("RETR up", got.append)
                self.assertEqual(b"".join(got), b"u" * 500000)
                self.assertIn("up", client.nlst())
                self.assertEqual(client.quit()[:3], "221")
            else:
                with self.assertRaises((ssl.SSLError, ftplib.error_perm, OSError)):
                    client.nlst()

    def test_openssl_s_client(self):
        for version in ("-tls1_2", "-tls1_3"):
            made = self.run_client("openssl", "s_client", "-connect", "127.0.0.1:%d" % self.daemon().port, "-starttls", "ftp",
                                   "-quiet", version, feed=b"USER alice\nPASS secret\nPWD\nQUIT\n")
            for code in (b"331 ", b"230 ", b"257 ", b"221 "):
                self.assertIn(code, made)


class TlsProcesses(TlsExam):
    """What a TLS process is, and what becomes of it."""

    def setUp(self):
        super().setUp()
        if not os.path.exists("/proc/self/task/%d/children" % os.getpid()):
            self.skipTest("needs Linux's /proc")

    def processes(self, *switches, title="pure-ftpd (TLS", patches=""):
        """pids of the server's processes of that title."""
        priv = self.daemon(*switches, patches=patches).process.pid
        return [pid for pid, shown in processes_below(priv) if shown.startswith(title)]

    @staticmethod
    def status(pid):
        with open("/proc/%d/status" % pid) as file:
            return dict(line.rstrip("\n").split(":\t", 1) for line in file if ":\t" in line)

    def descriptors(self, pid):
        """What the descriptors of a process are, and its listening sockets."""
        names = {int(fd): os.readlink("/proc/%d/fd/%s" % (pid, fd)) for fd in os.listdir("/proc/%d/fd" % pid)}
        with open("/proc/net/tcp") as file:
            listening = {"socket:[%s]" % line.split()[9] for line in file.readlines()[1:] if line.split()[3] == "0A"}
        return names, [name for name in names.values() if name in listening]

    def check_caged(self, pid):
        status = self.status(pid)
        self.assertEqual(status["NoNewPrivs"], "1")
        names, listening = self.descriptors(pid)
        self.assertEqual(listening, [])
        for fd, name in names.items():
            if fd > 2:
                self.assertTrue(name.startswith("socket:"), names)      # no key file, no copy of one
        if ROOT:
            self.assertNotIn("0", status["Uid"].split() + status["Gid"].split() + status["Groups"].split())
            self.assertEqual(os.listdir("/proc/%d/root" % pid), [])
            self.assertEqual(int(status["CapPrm"], 16) | int(status["CapEff"], 16), 0)

    def test_it_can_do_nothing(self):
        client = self.visitor()
        client.secure()
        self.assertEqual(client.code("NOOP"), 200)
        before, = self.processes()
        self.check_caged(before)
        self.assertLessEqual(len([fd for fd in self.descriptors(before)[0] if fd > 2]), 3)      # client, PRIV, poller or log
        self.assertEqual(client.login(), 230)
        after, = self.processes()
        self.assertEqual(before, after)                     # the same goes on as the relay
        self.check_caged(after)
        session, = self.processes(title="pure-ftpd (IDLE")
        names, listening = self.descriptors(session)
        self.assertEqual((listening, [name for name in names.values() if "memfd" in name or ".pem" in name]), ([], []))
        client.close()
        self.until(lambda: not self.processes() and not self.processes(title="pure-ftpd (IDLE"), "processes are left")

    @unittest.skipUnless(ROOT and os.path.exists("/proc/self/mem"), "needs root, and Linux' /proc")
    def test_the_key_is_in_no_other_process(self):
        """Nor is what reading its file leaves behind: at the start, and when it was renewed."""
        path = self.make_certificate("memory")
        server = self.server("-Y", "1", "-2", path, "-E", patches="pureftpd.FRESH_SECONDS = 0")
        for _ in range(3):
            for tls in (True, False):
                client = TlsClient(server.connect())
                self.addCleanup(client.close)
                self.assertEqual(client.reply()[0], 220)
                if tls:
                    client.secure()
                self.assertEqual(client.login(), 230, client.exchange())
            traces, used = self.traces_of_key(path)
            below = processes_below(server.process.pid)
            for pid, title in below[:1] + below[-2:]:
                memory = process_memory(pid)
                self.assertEqual([trace for trace in traces if trace in memory], [], title)
                self.assertEqual(used in memory, (pid, title) == below[-2], title)      # the session under TLS
            self.make_certificate("memory")

    def traces_of_key(self, path):
        """Pieces of a private key as its file has it, in DER and in base64; and as OpenSSL computes with it."""
        text = openssl("pkey", "-in", path, "-noout", "-text").decode()
        number = int(re.sub("[^0-9a-f]", "", text[text.index("priv:") + 5:text.index("pub:")]), 16)
        raw = number.to_bytes(32, "big")
        with open(path, "rb") as file:
            line = file.read().split(b"\n")[1]
        pieces = [raw[at:at + 8] for at in range(0, 32, 8)] + [line[at:at + 12] for at in range(0, 60, 12)]
        return pieces, number.to_bytes(32, "little")

    def test_one_for_each_client(self):
        clients = [self.secured() for _ in range(3)]
        self.assertEqual((len(self.processes()), len(self.processes(title="pure-ftpd (IDLE"))), (3, 3))
        for client in clients:
            self.assertEqual(client.code("QUIT"), 221)
            client.sock.unwrap()
        self.until(lambda: not self.processes(), "TLS processes are left")

    def come_back(self, *switches, patches=""):
        """A new client, as soon as the limit of clients lets one in."""
        while True:
            client = self.visitor(*switches, patches=patches, greeted=False)
            if client.reply()[0] == 220:
                return client
            self.assertLess(time.monotonic(), self.deadline, client.exchange())

    def test_whoever_is_killed_leaves_nothing(self):
        for title in ("pure-ftpd (TLS", "pure-ftpd (IDLE"):
            self.deadline = time.monotonic() + EXAM_SECONDS
            client = self.come_back("-c", "1")
            client.secure()
            self.assertEqual(client.login(), 230)
            self.assertEqual(self.visitor("-c", "1", greeted=False).reply()[0], 421)
            victim, = self.processes("-c", "1", title=title)
            os.kill(victim, signal.SIGKILL)
            self.rest_of_tls(client)
            client.close()
            self.come_back("-c", "1").close()
            self.until(lambda: not self.processes("-c", "1") and not self.processes("-c", "1", title="pure-ftpd (IDLE"),
                       "processes are left")

    def rest_of_tls(self, client):
        with contextlib.suppress(OSError):
            while client.sock.recv(65536):
                pass

    def test_a_client_that_says_nothing_any_more_is_gone(self):
        """Its TLS process waits for close_notify, but not for long."""
        patches = "pureftpd.GOODBYE_SECONDS = 0.2"
        client = self.secured(patches=patches)
        self.assertEqual(client.code("QUIT"), 221)
        self.until(lambda: not self.processes(patches=patches), "the TLS process is left")

    def test_ticket_keys_of_who_has_left_are_wiped(self):
        patches = """
kept, of_client, gone = [], pureftpd.Certificates.of_client, pureftpd.Monitor.gone
def keep(self, name):
    kept.append(of_client(self, name))
    return kept[-1]
def tell(self, child, status):
    gone(self, child, status)
    pureftpd.os.write(2, b"%d of %d clients' ticket keys are left\\n" % (sum(any(tls.ticket_keys) for tls in kept), len(kept)))
pureftpd.Certificates.of_client, pureftpd.Monitor.gone = keep, tell
"""
        self.secured(patches=patches, user=None).close()
        self.daemon(patches=patches).wait_for("0 of 1 clients' ticket keys are left")

    def test_long_rows_of_commands(self):
        """The relay passes replies on while the session takes no more commands."""
        client, count = self.secured(), 100000
        rows, sent, got = b"NOOP\r\n" * count, 0, 0
        client.sock.setblocking(False)
        poller = select.poll()
        poller.register(client.sock, select.POLLIN | select.POLLOUT)
        deadline = time.monotonic() + EXAM_SECONDS
        while got < count:
            self.assertLess(time.monotonic(), deadline, (sent, got))
            poller.poll(1000)
            with contextlib.suppress(ssl.SSLWantReadError, ssl.SSLWantWriteError):
                sent += client.sock.send(rows[sent:sent + 60000]) if sent < len(rows) else 0
                poller.modify(client.sock, select.POLLIN | (select.POLLOUT if sent < len(rows) else 0))
            with contextlib.suppress(ssl.SSLWantReadError, ssl.SSLWantWriteError):
                while got < count:
                    got += client.sock.recv(1 << 16).count(b"\n")

    # -- guessing passwords --------------------------------------------------------------------------

    QUICK = "pureftpd.DEFENDER_PAUSE_MAX = 0.01"

    def test_guessing_over_tls_is_counted_for_all_connections(self):
        switches = "--banafter", "4", "-c", "20"
        clients = []
        for _ in range(6):
            client = self.visitor(*switches, patches=self.QUICK)
            client.secure()
            self.assertEqual(client.code("USER alice"), 331)
            clients.append(client)
        for client in clients:
            client.send(b"PASS wrong\r\n")
        self.assertEqual([client.reply()[0] for client in clients], [530] * 6)
        self.daemon(*switches, patches=self.QUICK).wait_for("Banned for")
        lines = self.daemon(*switches, patches=self.QUICK).lines
        self.assertEqual(sum("Authentication failed for user [alice]" in line for line in lines), 4)
        self.assertEqual(clients[0].code("PASS secret"), 530)                   # nobody looks at it any more
        self.assertEqual(self.visitor(*switches, patches=self.QUICK, greeted=False).reply()[0], 421)

    def test_anonymous_users_who_are_refused_have_guessed_nothing(self):
        switches = "--banafter", "2", "-c", "18"
        patches = self.QUICK + """
def refused(*_):
    raise pureftpd.Refused("nobody is let in")
pureftpd.anonymous_account = refused
"""
        server = self.server("-Y", "1", "-2", self.certificate, *switches, patches=patches)
        for _ in range(4):
            client = TlsClient(server.connect())
            self.addCleanup(client.close)
            self.assertEqual(client.reply()[0], 220)
            client.secure()
            self.assertEqual(client.code("USER ftp"), 530)

    def test_a_good_password_takes_nothing_back(self):
        switches = "--banafter", "3", "-c", "19"
        for password, code in (("wrong", 530), ("secret", 230), ("wrong", 530), ("secret", 230), ("wrong", 530), ("secret", None)):
            client = self.visitor(*switches, patches=self.QUICK, greeted=False)
            first = client.reply()[0]
            self.assertEqual(first, 421 if code is None else 220)
            if code:
                client.secure()
                self.assertEqual(client.login(password=password), code)

    # SERVER's answer to the first consultations never comes.
    DEAF = """
answer = pureftpd.Server.on_consult
pureftpd.Server.on_consult = lambda self, message: None if self.last_id >> 24 == 1 and DEAF(self) else answer(self, message)
pureftpd.SERVER_RESTART_SECONDS = 0.01
count = [0]
def DEAF(server):
    count[0] += 1
    return count[0] <= 4
"""

    def test_the_server_dies_while_it_is_asked(self):
        client = self.visitor(patches=self.DEAF)
        client.secure()
        self.assertEqual(client.code("USER alice"), 331)
        server, = self.processes(title="pure-ftpd (SERVER)", patches=self.DEAF)
        client.send(b"PASS secret\r\n")
        os.kill(server, signal.SIGKILL)                     # PRIV asks the next one
        self.assertEqual(client.reply()[0], 230, client.exchange())

    def test_clients_that_leave_while_the_server_is_asked(self):
        """What they wanted is forgotten: -c limits how many may wait."""
        self.deadline = time.monotonic() + EXAM_SECONDS
        for _ in range(4):
            client = self.come_back("-c", "2", patches=self.DEAF)
            client.secure()
            self.assertEqual(client.code("USER alice"), 331)
            client.send(b"PASS secret\r\n")
            client.sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("@ii", 1, 0))
            client.close()
        client = self.come_back("-c", "2", patches=self.DEAF)
        client.secure()
        self.assertEqual(client.login(), 230, client.exchange())

    def test_the_end_of_the_server_is_told(self):
        daemon = ExamDaemon(self.place, ("-l", "puredb:" + self.users, "-Y", "1", "-2", self.certificate, "-E"))
        self.addCleanup(daemon.stop)
        client = TlsClient(daemon.connect())
        self.addCleanup(client.close)
        client.reply()
        client.secure()
        self.assertEqual(client.code("NOOP"), 200)
        daemon.process.terminate()
        self.assertEqual(client.reply()[0], 421)
        self.assertTrue(client.at_end())
        client.sock.unwrap()
        self.assertEqual(daemon.process.wait(EXAM_SECONDS), 0)


class TlsValues(unittest.TestCase):
    """What is parsed without OpenSSL."""

    def hello(self, name=None):
        outgoing = ssl.MemoryBIO()
        with contextlib.suppress(ssl.SSLWantReadError):
            client_context().wrap_bio(ssl.MemoryBIO(), outgoing, server_hostname=name).do_handshake()
        return outgoing.read()

    def test_the_name_in_a_client_hello(self):
        for name, seen in (("ftp.example", b"ftp.example"), ("FTP.Example", b"ftp.example"), (None, b""),
                           ("a" * 60 + ".example", b"a" * 60 + b".example")):
            self.assertEqual(pureftpd.hello_name(self.hello(name)), seen)
            self.assertEqual(pureftpd.hello_name(self.hello(name) + b"more"), seen)

    def test_pieces_of_a_client_hello(self):
        hello = self.hello("ftp.example")
        for length in range(len(hello)):
            self.assertIsNone(pureftpd.hello_name(hello[:length]), length)

    def test_nonsense_is_left_to_openssl(self):
        hello = self.hello("ftp.example")
        for data in (b"USER x\r\n", b"\x80\x2e\x01\x03\x01", b"\x16\x03\x01\xff\xff", b"\x16\x03\x01\x00\x00",
                     b"\x16\x03\x01\x00\x04\x01\x00\x00\x00", self.hello("a" * 20).replace(b"a" * 20, b"../../../../etc/passw")):
            self.assertEqual(pureftpd.hello_name(data), b"", data[:20])
        for at in range(len(hello)):                        # whatever is damaged: an answer, no exception
            for value in (0, 0xFF):
                name = pureftpd.hello_name(hello[:at] + bytes([value]) + hello[at + 1:])
                self.assertIsInstance(name, (bytes, type(None)))

    @unittest.skipUnless(OPENSSL, "needs openssl(1)")
    def test_the_end_of_a_certificate(self):
        for days in ("1", "400", "20000"):                  # UTCTime, and GeneralizedTime from 2050 on
            pem = openssl("req", "-x509", "-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:prime256v1", "-nodes", "-days", days,
                          "-subj", "/CN=x", "-keyout", "/dev/null").decode()
            ends = openssl("x509", "-enddate", "-noout", feed=pem.encode()).decode().strip().partition("=")[2]
            self.assertEqual(pureftpd.certificate_end(ssl, pem), ssl.cert_time_to_seconds(ends))
        for text in ("", "-----BEGIN CERTIFICATE-----\nAAAA\n-----END CERTIFICATE-----\n", "nonsense"):
            self.assertIsNone(pureftpd.certificate_end(ssl, text))


# ==== Tests: processes ============================================================================
# Whole servers: processes and privileges, limits, how they start, reload and stop, and what is left when one dies.
#
# What the processes are is read from /proc while they live. What they could do is asked of them: a probe is patched into the
# server that runs them. Whoever waits here waits for a line, an exit or a closed socket, and gives up after EXAM_SECONDS.


HAS_PROC = os.path.exists("/proc/self/task/%d/children" % os.getpid())
RESET = struct.pack("ii", 1, 0)                 # SO_LINGER: close() sends RST


def proc_status(pid):
    """/proc/PID/status as a dictionary; the ids as lists of numbers."""
    with open("/proc/%d/status" % pid) as file:
        found = dict(line.rstrip("\n").split(":", 1) for line in file)
    return {key: [int(n) for n in text.split()] if key in ("Uid", "Gid", "Groups") else text.strip()
            for key, text in found.items()}


def proc_children(pid):
    with open("/proc/%d/task/%d/children" % (pid, pid)) as file:
        return [int(child) for child in file.read().split()]


def proc_title(pid):
    """What ps shows; "" when the process is gone."""
    try:
        with open("/proc/%d/cmdline" % pid) as file:
            return file.read().strip("\0")
    except OSError:
        return ""


def proc_fds(pid):
    """What each descriptor of a process is, as /proc names it."""
    found = {}
    for fd in os.listdir("/proc/%d/fd" % pid):
        with contextlib.suppress(FileNotFoundError):
            found[int(fd)] = os.readlink("/proc/%d/fd/%s" % (pid, fd))
    return found


def proc_fds_at_rest(pid):
    """How many descriptors a process has: the least number in a tenth of a second, as some are there for a moment."""
    numbers = []
    for _ in range(20):
        numbers.append(len(proc_fds(pid)))
        select.select([], [], [], 0.005)
    return min(numbers)


def proc_limit(pid, name):
    """The hard limit called `name`."""
    with open("/proc/%d/limits" % pid) as file:
        return next(line[26:].split()[1] for line in file if line.startswith(name))


def tcp_sockets():
    """Of each TCP socket of this machine, by its name in /proc/PID/fd: (state, local port, remote port)."""
    found = {}
    for name in ("tcp", "tcp6"):
        with contextlib.suppress(OSError), open("/proc/net/" + name) as file:
            for line in file.readlines()[1:]:
                _, local, remote, state, *_, = line.split()[:4]
                ports = [int(address.rpartition(":")[2], 16) for address in (local, remote)]
                found["socket:[%s]" % line.split()[9]] = (state, *ports)
    return found


def ended(pid, seconds=EXAM_SECONDS):
    """Whether that process, which need not be our child, ends in time."""
    try:
        fd = os.pidfd_open(pid)
    except ProcessLookupError:
        return True
    try:
        return bool(select.select([fd], [], [], seconds)[0])
    finally:
        os.close(fd)


class LiveServer(ExamDaemon):
    """A server of one test, started with what that test wants to see."""

    def __init__(self, place, switches=(), patches="", command=None, listen="127.0.0.1,0", environment=None, cwd=None,
                 nofile=None, ready=r"Listening on \S+ port (\d+)", **more):
        self.lines, self.news = [], threading.Condition()
        self.directory = tempfile.mkdtemp(dir=place)
        os.chmod(self.directory, 0o755)
        self.state, self.pidfile = (os.path.join(self.directory, name) for name in ("state", "pid"))
        if command is None:
            command = [*EXAM_PYTHON, "-c", EXAM_WRAPPER % patches, *(("-S", listen) if listen else ()), "-f", "stderr", "-H",
                       "--banafter", "0", "--statedir", self.state, "-g", self.pidfile]
        limit = nofile and (lambda: resource.setrlimit(resource.RLIMIT_NOFILE, (nofile, nofile)))
        self.process = subprocess.Popen(
            [*command, *switches], cwd=cwd or self.directory, stderr=subprocess.PIPE, start_new_session=True, preexec_fn=limit,
            env={**os.environ, "PYTHONPATH": EXAM_PATH, "FTP_ANON_DIR": os.path.join(place, "ftp"), "TZ": "UTC",
                 **(environment or {})}, **{"stdin": subprocess.DEVNULL, "stdout": subprocess.DEVNULL, **more})
        self.reader = threading.Thread(target=self.collect)
        self.reader.start()
        self.pid, self.status = self.process.pid, 0
        if ready:
            try:
                match = self.wait_for(ready)
                self.port = int(match.group(1)) if match.groups() else 0
                self.server()
            except BaseException:
                self.process.kill()
                self.stop()
                raise

    def titles(self):
        """{pid: title} of PRIV's children."""
        return {pid: proc_title(pid) for pid in proc_children(self.pid)}

    def those(self, title):
        """pids of PRIV's children whose title begins so."""
        return [pid for pid, shown in self.titles().items() if shown.startswith("pure-ftpd (" + title)]

    def server(self):
        """pid of SERVER, as soon as there is one."""
        return until(lambda: self.those("SERVER"), self)[0]

    def session(self, state="IDLE"):
        """pid of the only session, as soon as it is in that state."""
        found = until(lambda: self.those(state), self)
        assert len(found) == 1, self.titles()
        return found[0]

    def entries(self):
        """Names on the scoreboard."""
        return sorted(name for name in os.listdir(self.state) if name.startswith("client-"))

    def visitor(self):
        client = ExamClient(self.connect())
        if client.reply()[0] != 220:
            client.close()
            raise AssertionError(client.exchange())
        return client

    def count(self, pattern):
        return sum(bool(re.search(pattern, line)) for line in self.lines)

    def ended(self):
        """The exit status, once everything is gone: the log ends when nobody holds it any more."""
        status = self.process.wait(EXAM_SECONDS)
        self.reader.join(EXAM_SECONDS)
        assert not self.reader.is_alive(), "processes are left behind:\n" + "".join(self.lines[-20:])
        return status

    def stop(self):
        if self.process.poll() is None:
            self.process.terminate()
        try:
            status = self.ended()
        finally:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(self.pid, signal.SIGKILL)
            self.process.wait()
            self.reader.join()
            self.process.stderr.close()
        assert status in (self.status, -signal.SIGKILL), (status, "".join(self.lines[-20:]))


def until(condition, server=None):
    """What `condition` returns as soon as that is true."""
    deadline = time.monotonic() + EXAM_SECONDS
    while True:
        found = condition()
        if found:
            return found
        if time.monotonic() > deadline:
            raise AssertionError("waited in vain, at last %r for:\n%s" % (found, "".join(server.lines[-20:]) if server else ""))
        select.select([], [], [], 0.002)


def reset(sock):
    """Close with RST."""
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, RESET)
    sock.close()


@unittest.skipIf(PROTOCOL_ORIGINAL or not HAS_PROC, "needs Linux's /proc, and our own processes")
class ProcExam(Exam):
    """Nothing is left after each class: no child, no descriptor, no file."""

    @classmethod
    def setUpClass(cls):
        before = len(os.listdir("/proc/self/fd"))
        cls.addClassCleanup(cls.check_nothing_is_left, before)
        super().setUpClass()

    @classmethod
    def check_nothing_is_left(cls, before):
        assert not proc_children(os.getpid()), "children are left"
        assert len(os.listdir("/proc/self/fd")) == before, proc_fds(os.getpid())
        assert not os.path.exists(cls.place), os.listdir(cls.place)

    def live(self, *switches, users=True, **more):
        """A server for this test alone."""
        server = LiveServer(self.place, [*(("-l", "puredb:" + self.users) if users else ()), *switches], **more)
        self.addCleanup(server.stop)
        return server

    def visit(self, server):
        client = server.visitor()
        self.addCleanup(client.close)
        return client

    def enter(self, server, user="alice"):
        """A client of `server` that has logged in."""
        client = self.visit(server)
        if user == "ftp":
            self.assertEqual(client.code("USER ftp"), 230, client.exchange())
        else:
            self.assertEqual(client.code("USER " + user), 331, client.exchange())
            self.assertEqual(client.code("PASS secret"), 230, client.exchange())
        self.assertEqual(client.code("TYPE I"), 200, client.exchange())
        return client

    def come_in(self, server):
        """A client that has logged in; None while the server has no room."""
        client = ExamClient(server.connect())
        self.addCleanup(client.close)
        if client.reply()[0] == 421:
            return None
        self.assertEqual((client.code("USER alice"), client.code("PASS secret"), client.code("TYPE I")), (331, 230, 200))
        return client

    def refused(self, server):
        try:
            server.connect().close()
        except ConnectionRefusedError:
            return True
        return False

    @staticmethod
    def free_port():
        with socket.create_server(("127.0.0.1", 0)) as probe:
            return probe.getsockname()[1]

    def turned_away(self, server):
        """What a client hears that is not let in; None when it is."""
        with server.connect() as sock:
            code, text = ExamClient(sock).reply()
        return text if code == 421 else None

    def downloading(self, server, client):
        """The data connection of a download that has begun and cannot end before we read it."""
        if not os.path.exists(os.path.join(self.home, "big")):
            path = self.put("big")
            os.truncate(path, 64 << 20)
        data = client.passive()
        self.addCleanup(data.close)
        self.assertEqual(client.code("RETR big"), 150, client.exchange())
        self.assertTrue(data.recv(1000))
        return data

    def uploading(self, client, name="up"):
        data = client.passive()
        self.addCleanup(data.close)
        self.assertEqual(client.code("STOR " + name), 150, client.exchange())
        data.sendall(b"x" * 1000)
        return data

    @staticmethod
    def drained(sock):
        """Bytes till the end."""
        count = 0
        while True:
            data = sock.recv(1 << 20)
            if not data:
                return count
            count += len(data)


# Tells of every read from a network socket, and whether any of the reader's uids is 0. It is tried at once.
SPY = """
import socket, stat
def spy(place, name, of_network):
    call = getattr(place, name)
    def wrapped(first, *more, **named):
        if of_network(first):
            os.write(2, b"%s %s\\n" % (b"ROOT-READ" if 0 in os.getresuid() else b"USER-READ", name.encode()))
        return call(first, *more, **named)
    setattr(place, name, wrapped)
def network(sock):
    return sock.family in (socket.AF_INET, socket.AF_INET6)
def network_fd(fd):
    if not stat.S_ISSOCK(os.fstat(fd).st_mode):
        return False
    with socket.socket(fileno=os.dup(fd)) as sock:
        return network(sock)
for name in ("recv", "recv_into", "recvfrom", "recvfrom_into", "recvmsg", "recvmsg_into"):
    spy(socket.socket, name, network)
spy(os, "read", network_fd)
spy(os, "readv", network_fd)
spy(pureftpd, "splice", network_fd)
with socket.create_server(("127.0.0.1", 0)) as listener, socket.create_connection(listener.getsockname()) as one:
    with listener.accept()[0] as two:
        two.send(b"12")
        one.recv(1), os.read(one.fileno(), 1)
os.write(2, b"The spy works\\n")
"""

# Has the processes of that class try what they must not be able to do.
PROBE = """
def probed(run):
    def probe(self):
        for call in %r:
            try:
                result = eval(call)
            except (OSError, ValueError) as error:
                result = "refused: " + type(error).__name__
            os.write(2, ("PROBE %%s = %%s\\n" %% (call, result)).encode())
        run(self)
    return probe
pureftpd.%s.run = probed(pureftpd.%s.run)
"""


class ProcessInvariants(ProcExam):
    """design.md's invariants 1 to 3 and 5, seen in living processes."""

    def check_gone_for_good(self, pid, uid, gid, groups):
        status = proc_status(pid)
        self.assertEqual(status["NoNewPrivs"], "1")
        self.assertEqual(proc_limit(pid, "Max core file size"), "0")
        self.assertEqual(status["Uid"], [uid] * 4)
        self.assertEqual(status["Gid"], [gid] * 4)
        self.assertEqual(int(status["CapPrm"], 16) | int(status["CapEff"], 16) | int(status["CapInh"], 16), 0)
        if ROOT:
            self.assertEqual(status["Groups"], groups)

    def cage_account(self):
        account = pureftpd.privsep_account()
        return account.uid, account.gid, [account.gid]

    def test_names_as_ps_shows_them(self):
        server = self.live()
        client = self.enter(server)
        self.assertEqual(proc_title(server.pid), "pure-ftpd (PRIV)")
        self.assertEqual(sorted(server.titles().values()), ["pure-ftpd (IDLE)", "pure-ftpd (SERVER)"])
        for pid in (server.pid, *server.titles()):
            self.assertTrue(proc_status(pid)["Name"].startswith("pure-ftpd"))
        data = self.downloading(server, client)
        until(lambda: server.those("DOWNLOAD"), server)
        client.send(b"ABOR\r\n")
        data.close()
        until(lambda: server.those("IDLE"), server)
        self.uploading(self.enter(server))
        until(lambda: server.those("UPLOAD"), server)

    def test_priv_rests_without_root(self):
        """Invariant 1: root is within its reach only, and no client's connection is within its hands."""
        server = self.live()
        self.enter(server)
        self.visit(server)
        status, uid = proc_status(server.pid), os.geteuid()
        if ROOT:
            uid, gid, groups = self.cage_account()
            self.assertNotEqual(uid, 0)
            self.assertEqual((status["Uid"], status["Groups"], status["Gid"][1]), ([0, uid, 0, uid], groups, gid))
            self.assertEqual(int(status["CapEff"], 16), 0)
        self.assertEqual(status["Uid"][1], uid)
        sockets = tcp_sockets()
        for fd, name in proc_fds(server.pid).items():
            self.assertTrue(fd < 3 or name.startswith("socket:") or "eventpoll" in name, name)
            if name in sockets:
                self.assertEqual(sockets[name][0], "0A", "PRIV holds a connection")

    def test_server_is_caged(self):
        server = self.live()
        visitor = self.visit(server)
        self.enter(server)
        pid = server.server()
        self.check_gone_for_good(pid, *self.cage_account())
        self.assertEqual(proc_limit(pid, "Max processes"), "0")
        if ROOT:
            self.assertEqual(os.readlink("/proc/%d/root" % pid), os.path.join(server.state, "empty"))
            self.assertEqual(os.listdir("/proc/%d/root" % pid), [])
        sockets = tcp_sockets()
        remote = []
        for fd, name in proc_fds(pid).items():
            self.assertTrue(fd < 3 or name.startswith("socket:") or "eventpoll" in name, name)
            if name in sockets and sockets[name][0] != "0A":
                remote.append(sockets[name][2])
        self.assertEqual(remote, [visitor.sock.getsockname()[1]])       # the one who logged in is a stranger to it

    def test_server_can_touch_nothing(self):
        calls = ("os.open('/etc/passwd', os.O_RDONLY)", "os.open('/', os.O_RDONLY) and os.listdir('/')",
                 "os.mkdir('/made')", "os.open('/made', os.O_CREAT | os.O_WRONLY)", "os.fork()", "os.setuid(0)", "os.chroot('/')")
        server = self.live(patches=PROBE % (calls, "Server", "Server"))
        for call in calls:
            result = server.wait_for("PROBE %s = (.*)" % re.escape(call)).group(1)
            if server.count("does not offer.*Landlock") and "passwd" in call:
                continue
            if ROOT and "listdir" in call:
                self.assertEqual(result, "[]")
            else:
                self.assertIn("refused", result, call)

    def test_server_has_no_password_but_the_one_that_is_being_checked(self):
        self.assertNotIn("password", pureftpd.Visitor.__slots__)

    def check_session(self, server, pid, client, data=None, files=()):
        """Invariant 3: what descriptors a session has, each one accounted for."""
        sockets, ours = tcp_sockets(), {client.sock.getsockname()[1]: "control"}
        if data is not None:
            ours[data.getsockname()[1]] = "data"
        seen = []
        for fd, name in proc_fds(pid).items():
            if fd < 3:
                self.assertTrue(name == "/dev/null" or name.startswith("pipe:"), name)
            elif name in sockets:
                self.assertNotEqual(sockets[name][1:], (server.port, 0), "a session holds the listening socket")
                if sockets[name][0] == "0A":
                    seen.append("passive")
                else:
                    self.assertIn(sockets[name][2], ours, "a session holds the socket of somebody else")
                    seen.append(ours[sockets[name][2]])
            elif name.startswith("socket:"):
                seen.append("channel")
            elif name.startswith("pipe:"):
                seen.append("pipe")
            elif name.startswith("/memfd") or "eventpoll" in name:
                self.fail(name)
            elif os.path.dirname(name) == server.state:
                self.assertEqual(os.path.basename(name), "client-%08d" % pid)
                seen.append("entry")
            elif os.path.isdir(name):
                self.assertFalse(ROOT, "a session holds the directory " + name)
                self.assertEqual(os.path.commonpath([name, self.home]), self.home)
            else:
                self.assertIn(name, [os.path.join(self.home, known) for known in files])
                seen.append("file")
        for once in ("control", "channel", "entry", "passive", "data"):
            self.assertLessEqual(seen.count(once), 1, seen)
        self.assertIn("control", seen)
        return sorted(seen)

    def check_is_user(self, pid):
        uid = EXAM_UID
        self.check_gone_for_good(pid, uid, uid if ROOT else os.getegid(), [uid])
        if ROOT:
            self.assertEqual(os.readlink("/proc/%d/root" % pid), self.home)
            self.assertEqual(os.readlink("/proc/%d/cwd" % pid), self.home)

    def test_a_session_is_the_user_in_every_state(self):
        server = self.live("-A")
        other, client = self.enter(server), self.enter(server, "bob")
        bobs = [pid for pid in server.those("IDLE") if "%s/bob" % self.place in os.readlink("/proc/%d/root" % pid)]
        self.assertEqual(len(bobs), int(ROOT))
        client.close()
        pid = until(lambda: len(server.those("IDLE")) == 1 and server.those("IDLE")[0], server)
        self.check_is_user(pid)
        self.assertEqual(self.check_session(server, pid, other), ["channel", "control", "entry"])
        self.visit(server), self.visit(server)                          # whose sockets it must not get
        data = self.downloading(server, other)
        until(lambda: server.those("DOWNLOAD"), server)
        self.check_is_user(pid)
        self.assertIn("file", self.check_session(server, pid, other, data, ["big"]))
        self.assertGreaterEqual(self.drained(data), (64 << 20) - 1000)
        data.close()
        self.assertEqual(other.reply()[0], 226)
        with self.uploading(other) as data:
            until(lambda: server.those("UPLOAD"), server)
            self.check_is_user(pid)
            self.assertIn("file", self.check_session(server, pid, other, data, ["up"]))
        self.assertEqual(other.reply()[0], 226)
        self.check_is_user(pid)
        self.check_session(server, pid, other)

    def test_a_session_that_is_not_locked_in_is_the_user_all_the_same(self):
        server = self.live()
        client = self.enter(server, "bob")
        pid = server.session()
        self.check_gone_for_good(pid, EXAM_UID, EXAM_UID if ROOT else os.getegid(), [EXAM_UID])
        self.assertEqual(os.readlink("/proc/%d/root" % pid), "/")
        self.assertEqual(client.say("PWD")[1], b'257 "%s/bob" is your current location\r\n' % os.fsencode(self.place))

    @unittest.skipUnless(ROOT, "needs root")
    def test_anonymous_users_are_the_ftp_user(self):
        server = self.live()
        self.enter(server, "ftp")
        pid = server.session()
        self.check_gone_for_good(pid, EXAM_FTP_UID, EXAM_FTP_UID, [EXAM_FTP_UID])
        self.assertEqual(os.readlink("/proc/%d/root" % pid), self.ftp)

    @unittest.skipUnless(ROOT, "needs root")
    def test_root_is_out_of_reach_after_the_login(self):
        calls = ("os.setuid(0)", "os.seteuid(0)", "os.setresuid(-1, 0, -1)", "os.setreuid(0, 0)", "os.setgid(0)", "os.setegid(0)",
                 "os.setgroups([0])", "os.chroot('.')", "os.initgroups('root', 0)")
        server = self.live(patches=PROBE % (calls, "Session", "Session"))
        for user in ("alice", "bob", "ftp"):
            with self.subTest(user):
                before = server.count("PROBE")
                self.enter(server, user)
                until(lambda: server.count("PROBE") == before + len(calls), server)
        self.assertEqual(server.count("PROBE .* = refused: PermissionError"), 3 * len(calls), server.lines[-20:])

    @unittest.skipUnless(ROOT, "needs root")
    def test_no_root_process_reads_from_a_client(self):
        """Invariant 1. The login child gets name and password in a message, so it reads nothing at all from the socket."""
        server = self.live(patches=SPY)
        server.wait_for("The spy works")
        self.assertEqual([server.count("ROOT-READ " + name) for name in ("recv", "read")], [1, 1])
        wrong = self.visit(server)
        self.assertEqual([wrong.code(line) for line in ("USER alice", "PASS wrong")], [331, 530])
        hasty = self.visit(server)
        hasty.send(b"USER alice\r\nPASS secret\r\nTYPE I\r\nPWD\r\n")
        self.assertEqual([hasty.reply()[0] for _ in range(4)], [331, 230, 200, 257])
        content = bytes(pureftpd.SPLICE_AFTER + (1 << 20))
        self.assertEqual(hasty.store("STOR f", content)[0], 226)
        self.assertEqual(hasty.fetch("RETR f")[2], content)
        self.assertEqual(hasty.fetch("LIST")[0], 226)
        with hasty.active() as listener:
            hasty.send(b"NLST\r\n")
            self.assertEqual(hasty.reply()[0], 150)
            listener.accept()[0].close()
            self.assertIn(hasty.reply()[0], (226, 426))
        for client in (self.enter(server, "ftp"), self.enter(server, "bob"), hasty):
            self.assertEqual(client.code("QUIT"), 221)
        until(lambda: not server.those("IDLE"), server)
        self.assertGreater(server.count("USER-READ recv"), 10)
        self.assertGreater(server.count("USER-READ splice"), 0)
        self.assertEqual(server.count("ROOT-READ"), 2, [line for line in server.lines if "ROOT" in line])

    @unittest.skipIf(ROOT, "what Landlock is for without root")
    def test_landlock_holds_sessions_where_the_kernel_has_it(self):
        outside = os.path.join(self.place, "outside")
        calls = ("os.open('/etc/passwd', os.O_RDONLY)", "os.open(%r, os.O_RDONLY)" % outside,
                 "os.open(%r, os.O_CREAT | os.O_WRONLY)" % os.path.join(outside, "made"), "len(os.listdir(%r))" % self.home)
        server = self.live(patches=PROBE % (calls, "Session", "Session"))
        self.enter(server)
        results = [server.wait_for("PROBE %s = (.*)" % re.escape(call)).group(1) for call in calls]
        if server.count("No Landlock here: alice"):
            self.skipTest("this kernel has no Landlock")
        self.assertEqual(results, ["refused: PermissionError"] * 3 + ["0"])


class ProcessDeaths(ProcExam):
    """Invariant 4: whoever dies leaves nothing behind, and nobody else is harmed."""

    def gone(self, client):
        """The server has let go of this client."""
        self.assertTrue(client.at_end(), client.exchange())

    def test_a_killed_session_is_forgotten(self):
        server = self.live("-C", "1")
        for work in (None, "RETR", "STOR"):
            with self.subTest(work):
                client = until(lambda: self.come_in(server), server)
                data = self.downloading(server, client) if work == "RETR" else self.uploading(client) if work else None
                pid, = [pid for pid in server.titles() if pid != server.server()]
                self.assertEqual(server.entries(), ["client-%08d" % pid])
                self.assertIn(b"Too many connections (1)", self.turned_away(server))
                os.kill(pid, signal.SIGKILL)
                self.gone(client)
                if work:
                    with contextlib.suppress(ConnectionResetError):
                        self.drained(data)
                until(lambda: not server.entries(), server)
                server.wait_for("process %d of 127.0.0.1 was ended by signal 9" % pid)
                self.assertEqual(list(server.titles().values()), ["pure-ftpd (SERVER)"])
        until(lambda: not self.turned_away(server), server)

    def test_a_killed_server_is_started_again_and_sessions_go_on(self):
        server = self.live("-c", "3", patches="pureftpd.SERVER_RESTART_SECONDS = 0.01")
        idle, busy, visitor = self.enter(server), self.enter(server), self.visit(server)
        data, first = self.downloading(server, busy), server.server()
        os.kill(first, signal.SIGKILL)
        self.gone(visitor)
        server.wait_for("SERVER is gone, starting it again")
        until(lambda: [pid for pid in server.those("SERVER") if pid != first], server)
        self.assertEqual(idle.code("NOOP"), 200)
        third = self.visit(server)                                      # it knows the two that are logged in
        self.assertIn(b"3 users (the maximum)", self.turned_away(server))
        self.drained(data)
        data.close()
        self.assertEqual(busy.reply()[0], 226)
        for client in (busy, idle, third):
            self.assertEqual(client.code("QUIT"), 221)
            self.gone(client)
        until(lambda: not server.entries(), server)
        self.assertEqual(until(lambda: self.come_in(server), server).code("NOOP"), 200)

    def test_a_server_that_cannot_run_ends_the_daemon(self):
        server = self.live(patches="pureftpd.SERVER_RESTART_SECONDS = 0.05\npureftpd.Server.run = lambda self: os._exit(3)",
                           ready=None)
        server.status = 1
        self.assertEqual(server.ended(), 1)
        self.assertEqual(server.count("SERVER cannot run: giving up"), 1)
        self.assertFalse(os.path.exists(server.pidfile))

    def test_when_priv_is_killed_transfers_finish_and_all_end(self):
        self.adopt_orphans()
        server = self.live()
        idle, down, up, visitor = self.enter(server), self.enter(server), self.enter(server), self.visit(server)
        ends = self.downloading(server, down), self.uploading(up)
        pids = list(server.titles())
        self.assertEqual((len(pids), len(server.entries())), (4, 3))
        os.kill(server.pid, signal.SIGKILL)
        self.gone(visitor)
        self.assertEqual(idle.reply()[0], 421)
        self.gone(idle)
        self.assertGreaterEqual(self.drained(ends[0]), (64 << 20) - 1000)
        ends[1].sendall(b"y" * 1000)
        for data, client in zip(ends, (down, up)):
            data.close()
            self.assertEqual([client.reply()[0], client.reply()[0]], [226, 421])
            self.gone(client)
        self.assertEqual(self.content("up"), b"x" * 1000 + b"y" * 1000)
        self.assertEqual(server.ended(), -signal.SIGKILL)
        for pid in pids:
            self.assertTrue(ended(pid))
            os.waitpid(pid, 0)
        with self.assertRaises(OSError):
            server.connect()
        again = self.live("--statedir", server.state, "-g", server.pidfile)
        self.assertEqual(server.entries(), [])
        with open(server.pidfile) as file:
            self.assertEqual(file.read(), "%d\n" % again.pid)

    def adopt_orphans(self):
        """Orphans become our children in this test (prctl(2), PR_SET_CHILD_SUBREAPER): not every init looks after its own."""
        pureftpd.libc.call("prctl", 36, 1, 0, 0, 0)
        self.addCleanup(pureftpd.libc.call, "prctl", 36, 0, 0, 0, 0)

    def test_when_priv_is_killed_a_hanging_login_ends_too(self):
        server = self.live(patches=HANGING + "pureftpd.LOGIN_CHECK_SECONDS = 1")
        client = self.visit(server)
        client.code("USER alice")
        client.send(b"PASS secret\r\n")
        server.wait_for("checking")
        os.kill(server.pid, signal.SIGKILL)
        self.gone(client)
        self.assertEqual(server.ended(), -signal.SIGKILL)

    def test_a_killed_login_child_is_no_wrong_password(self):
        server = self.live("--banafter", "1", patches=HANGING)
        client = self.visit(server)
        client.code("USER alice")
        client.send(b"PASS secret\r\n")
        pid = int(server.wait_for(r"checking (\d+)").group(1))
        os.kill(pid, signal.SIGKILL)
        self.assertEqual(client.reply()[0], 421)
        self.assertIsNone(self.turned_away(server))

    def test_two_hundred_resets_leave_nothing(self):
        first, last = self.free_range(60)
        server = self.live("-p", "%d:%d" % (first, last))
        pids = server.pid, server.server()
        self.enter(server).close()
        until(lambda: list(server.titles()) == [pids[1]], server)
        before = [len(proc_fds(pid)) for pid in pids]
        steady = self.enter(server)
        inside = server.session()
        held = len(proc_fds(inside))
        for number in range(100):
            with self.uploading(steady, "u") if number % 2 else self.downloading(server, steady) as data:
                reset(data)
            self.assertIn(steady.reply()[0], (226, 426, 451), steady.exchange())
        self.assertLessEqual(len(proc_fds(inside)), held + 1)           # the passive socket is kept for the next transfer
        self.assertEqual(steady.code("QUIT"), 221)
        for number in range(100):
            client = ExamClient(server.connect())
            client.send(b"USER alice\r\nPASS secret\r\nTYPE I\r\n")
            self.assertEqual([client.reply()[0] for _ in range(4)], [220, 331, 230, 200])
            data = self.uploading(client, "u") if number % 2 else self.downloading(server, client)
            reset(client.sock)
            reset(data)
        until(lambda: list(server.titles()) == [pids[1]], server)
        self.assertEqual([len(proc_fds(pid)) for pid in pids], before)
        self.assertEqual((server.entries(), server.count("bug:")), ([], 0))
        self.assertFalse([port for state, port, _ in tcp_sockets().values() if state == "0A" and first <= port <= last])
        self.assertEqual(self.enter(server).fetch("NLST")[0], 226)

    @staticmethod
    def free_range(count):
        """The first and last of as many ports that nobody uses now."""
        while True:
            with socket.create_server(("127.0.0.1", 0)) as probe:
                first = probe.getsockname()[1]
            last = first + count - 1
            if last < 65536 and not any(first <= port <= last for _, port, _ in tcp_sockets().values()):
                return first, last

    def test_clients_that_vanish_before_their_login_is_checked(self):
        """Each of these messages carries the socket of a connection that is no more."""
        server = self.live("-c", "200")
        first = server.server()
        visitor = self.visit(server)
        for number in range(50):
            client = server.visitor()
            client.send(b"USER ftp\r\n" if number % 2 else b"USER alice\r\nPASS secret\r\n")
            reset(client.sock)
        self.assertEqual(visitor.code("USER alice"), 331)
        self.assertEqual(server.server(), first)
        until(lambda: list(server.titles()) == [first], server)
        self.assertEqual(server.count("bug:|closing the channel"), 0, server.lines[-20:])


# A back end that says who asks it, and does not come back, but for bob.
HANGING = """
authenticate = pureftpd.authenticate
def hanging(*args):
    if args[1] == b"bob":
        return authenticate(*args)
    os.write(2, b"checking %d\\n" % os.getpid())
    while True:
        __import__("signal").pause()
pureftpd.authenticate = hanging
pureftpd.STOP_SECONDS = 0
"""


class ProcessLimits(ProcExam):
    """How many clients, sessions, descriptors and logins there may be at once."""

    def check_room(self, server, count):
        """`count` clients have room, and no more. They leave again."""
        clients = [self.visit(server) for _ in range(count)]
        self.assertTrue(self.turned_away(server))
        for client in clients:
            client.close()

    def wait_for_room(self, server, count):
        def room():
            with contextlib.ExitStack() as stack:
                for _ in range(count):
                    client = ExamClient(server.connect())
                    stack.callback(client.close)
                    if client.reply()[0] != 220:
                        return False
                return True
        until(room, server)

    def test_clients_are_counted_before_and_after_the_login(self):
        for switch in ("-c", "-C"):
            with self.subTest(switch):
                server = self.live(switch, "3", patches="pureftpd.SERVER_RESTART_SECONDS = 0.01")
                self.check_room(server, 3)
                self.wait_for_room(server, 3)
                sessions = [until(lambda: self.come_in(server), server) for _ in range(2)]
                third = until(lambda: self.admitted(server), server)
                self.assertTrue(self.turned_away(server))
                third.close()
                os.kill(server.server(), signal.SIGKILL)
                until(lambda: self.both(server), server)
                third = until(lambda: self.admitted(server), server)
                self.assertTrue(self.turned_away(server))
                for client in (third, *sessions):
                    self.assertEqual(client.code("QUIT"), 221)
                self.wait_for_room(server, 3)
                self.assertEqual(len(server.those("SERVER")), 1)

    def both(self, server):
        """A new SERVER listens."""
        return server.count("starting it again") and server.those("SERVER")

    def admitted(self, server):
        client = ExamClient(server.connect())
        self.addCleanup(client.close)
        return client if client.reply()[0] == 220 else None

    def test_a_login_through_a_server_that_drains_is_counted_by_the_next(self):
        for switch in ("-c", "-C"):
            with self.subTest(switch):
                server = self.live(switch, "2")
                visitor = self.visit(server)
                server.process.send_signal(signal.SIGHUP)
                server.wait_for("configuration was read again")
                until(lambda: len(server.those("SERVER")) == 2, server)
                self.assertEqual((visitor.code("USER alice"), visitor.code("PASS secret")), (331, 230))
                until(lambda: len(server.those("SERVER")) == 1, server)
                second = self.visit(server)
                self.assertTrue(self.turned_away(server))
                self.assertEqual(visitor.code("QUIT"), 221)
                until(lambda: not self.turned_away(server), server)
                second.close()
                self.wait_for_room(server, 2)

    def test_many_sessions_that_end_while_server_sleeps_are_all_forgotten(self):
        """More than fit into a channel. PRIV waits for nobody, and forgets nothing."""
        server = self.live("-c", "2", patches=NOTHING_BUT_ENDS)
        self.wait_for_room(server, 2)

    def test_out_of_descriptors_server_recovers(self):
        server = self.live("-c", "500", nofile=64)
        first = server.server()
        clients, turned = [], 0
        for _ in range(120):
            client = ExamClient(server.connect())
            self.addCleanup(client.close)
            turned += client.reply()[0] == 421
            clients.append(client)
        self.assertTrue(20 < turned < 100, turned)
        server.wait_for("Out of file descriptors: raise the limit")
        self.assertEqual(server.count("Out of file descriptors"), 1)
        for client in clients:
            reset(client.sock)
        until(lambda: not self.turned_away(server), server)
        self.assertEqual(self.enter(server).code("NOOP"), 200)
        self.assertEqual(server.server(), first)

    def test_out_of_descriptors_priv_refuses_logins_and_recovers(self):
        server = self.live("-c", "500", nofile=40)
        first, sessions, refused = server.server(), [], 0
        for _ in range(60):
            client = self.visit(server)
            client.code("USER alice")
            code = client.code("PASS secret")
            self.assertIn(code, (230, 421), client.exchange())
            refused += code == 421
            sessions.append(client)
        self.assertTrue(10 < refused < 50, refused)
        self.assertEqual(sessions[0].code("NOOP"), 200)
        listener = sessions[0].active()                                 # PRIV has no descriptor for port 20's socket
        sessions[0].send(b"NLST\r\n")
        self.assertIn(sessions[0].reply()[0], (150, 425))
        listener.close()
        for client in sessions:
            client.close()
        until(lambda: list(server.titles()) == [first], server)
        self.assertEqual(self.enter(server).code("NOOP"), 200)
        self.assertEqual(server.count("closing the channel|bug:"), 0, server.lines[-20:])

    def test_logins_that_priv_has_no_descriptor_for_are_refused(self):
        """Those that wait for a check are held by PRIV, too."""
        server = self.live("-c", "100", nofile=48, patches=HANGING + "pureftpd.DEFENDER_PARALLEL = 100")
        first, clients, sessions = server.server(), [], [self.enter(server, "bob") for _ in range(10)]
        for _ in range(34):
            clients.append(self.visit(server))
            clients[-1].send(b"USER alice\r\nPASS secret\r\n")
        self.assertEqual([client.reply()[0] for client in clients], [331] * 34)
        until(lambda: server.count("checking") == pureftpd.LOGIN_CHECKS, server)
        self.assertEqual([client.reply()[0] for client in clients[30:]], [421] * 4)
        self.assertEqual([client.code("NOOP") for client in sessions], [200] * 10)
        self.assertEqual((server.count("closing the channel"), server.server()), (0, first))

    def test_five_thousand_idle_visitors_are_in_nobodys_way(self):
        hard = resource.getrlimit(resource.RLIMIT_NOFILE)[1]
        before = resource.getrlimit(resource.RLIMIT_NOFILE)
        resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
        self.addCleanup(resource.setrlimit, resource.RLIMIT_NOFILE, before)
        count = min(5000, hard - 100)
        server = self.live("-c", "6000")
        crowd = [deadline_socket(socket.create_connection(("127.0.0.1", server.port))) for _ in range(count)]
        for sock in crowd:
            self.addCleanup(sock.close)
        crowd[-1].recv(4)                                               # greeted: all the others were accepted before
        start = time.monotonic()
        for _ in range(2):
            for sock in crowd[::2]:
                sock.send(b"U")
            self.assertEqual(self.enter(server).code("NOOP"), 200)
        self.assertLess(time.monotonic() - start, 5)
        fds = len(proc_fds(server.server()))
        self.assertGreaterEqual(fds, count)
        for sock in crowd:
            reset(sock)
        until(lambda: len(proc_fds(server.server())) < 20, server)

    def test_few_logins_are_checked_at_once(self):
        server = self.live("-c", "60", patches=HANGING + "pureftpd.DEFENDER_PARALLEL = 100")
        clients = [self.visit(server) for _ in range(40)]
        for client in clients:
            client.send(b"USER alice\r\nPASS secret\r\n")
        until(lambda: server.count("checking") == pureftpd.LOGIN_CHECKS, server)
        self.assertEqual([self.visit(server).code("NOOP") for _ in range(3)], [200] * 3)     # SERVER is free meanwhile
        self.assertEqual(server.count("checking"), pureftpd.LOGIN_CHECKS)
        for number in range(16, 24):                                    # each that ends makes room for one that waits
            os.kill(int(re.search(r"checking (\d+)", [line for line in server.lines if "checking" in line][number - 16])
                        .group(1)), signal.SIGKILL)
            until(lambda: server.count("checking") == number + 1, server)

    def test_a_check_that_hangs_is_ended(self):
        server = self.live(patches=HANGING + "pureftpd.LOGIN_CHECK_SECONDS = 1")
        client = self.visit(server)
        client.code("USER alice")
        self.assertEqual(client.code("PASS secret"), 421)
        server.wait_for("LOGIN process .* was ended by signal 14")
        self.assertEqual(len(server.titles()), 1)


# Before anybody comes, PRIV tells SERVER, which is stopped, of the ends of 600 sessions it was told of at its start.
NOTHING_BUT_ENDS = """
import signal
fork = pureftpd.Monitor.fork
def with_the_dead(self, state, function, **known):
    if state != "SERVER":
        return fork(self, state, function, **known)
    server = {number: "127.0.0.1" for number in range(1, 601)}
    child = fork(self, state, lambda channel: self.server_child(channel, server))
    os.kill(child.pid, signal.SIGSTOP)
    for number in server:
        self.tell_servers(pureftpd.NUMBERED.pack(pureftpd.ENDED, number, 0))
    os.kill(child.pid, signal.SIGCONT)
    return child
pureftpd.Monitor.fork = with_the_dead
"""


class QuietLog:
    """A log that keeps its lines."""

    def __init__(self):
        self.lines, self.who, self.socket = [], "", None

    def write(self, text):
        self.lines.append(text)

    error = warning = notice = info = debug = write


@unittest.skipIf(PROTOCOL_ORIGINAL or not HAS_PROC, "needs Linux's /proc, and our own processes")
class ProcessMessages(unittest.TestCase):
    """Nonsense on a channel: whoever hears it closes that channel, keeps no descriptor of it, and serves the others."""

    @classmethod
    def setUpClass(cls):
        cls.options = pureftpd.options_read(["-l", "puredb:/nonexistent", "-f", "none"])

    def setUp(self):
        self.log, self.forks, self.before = QuietLog(), [], len(os.listdir("/proc/self/fd"))
        account = pureftpd.privsep_account()._replace(root=False)
        fields = dict.fromkeys(pureftpd.Setup._fields)
        fields.update(options=self.options, log=self.log, privileges=account, statedir="/nonexistent", empty=b"/nonexistent",
                      aliases={}, anonymous_root=b"/")
        self.monitor = pureftpd.Monitor(pureftpd.Setup(**fields), [], [])
        self.monitor.fork = self.no_fork
        self.addCleanup(self.check_nothing_is_left)
        self.addCleanup(self.monitor.selector.close)

    def check_nothing_is_left(self):
        self.assertEqual(len(os.listdir("/proc/self/fd")), self.before, proc_fds(os.getpid()))

    def no_fork(self, state, function, **known):
        self.forks.append(state)
        raise OSError(errno.EAGAIN, "not in this test")

    def child(self, state, peer=None):
        """A child as PRIV knows it, and the other end of its channel."""
        ours, theirs = pureftpd.channel_pair()
        self.addCleanup(ours.close)
        self.addCleanup(theirs.close)
        ours.setblocking(False)
        theirs.setblocking(False)
        child = pureftpd.Child(1 << 22, state, ours, 7, peer)
        self.monitor.children[id(child)] = child
        self.monitor.selector.register(ours, selectors.EVENT_READ, None)
        return child, theirs

    STATES = ("SERVER", "TLS", "LOGIN", "SESSION")
    PEER = pureftpd.Peer("127.0.0.1", 4711, "127.0.0.1", 21)

    def hears(self, state, message, fds=()):
        """Whether PRIV still listens to a child in `state` that sent this. The channel of another one must stay."""
        other, _ = self.child("SESSION", self.PEER)
        child, theirs = self.child(state, None if state == "SERVER" else self.PEER)
        socket.send_fds(theirs, [message], list(fds)) if fds else theirs.send(message)
        self.monitor.on_message(child)
        self.assertGreaterEqual(other.channel.fileno(), 0)
        heard = child.channel.fileno() >= 0
        for one in (other, child):
            self.monitor.drop_channel(one)
        return heard

    def test_priv_listens_to_what_that_child_may_say_only(self):
        login = pureftpd.login_message(pureftpd.LoginRequest(1, b"a", b"b", pureftpd.Negotiated(), b""))
        good = {
            ("LOGIN", pureftpd.ADMITTED): pureftpd.PLAIN.pack(pureftpd.ADMITTED, 0),
            ("SESSION", pureftpd.BINDRESPORT): pureftpd.PLAIN.pack(pureftpd.BINDRESPORT, 4),
            ("SESSION", pureftpd.REMOVEFTPWHOENTRY): pureftpd.PLAIN.pack(pureftpd.REMOVEFTPWHOENTRY, 0),
        }
        for key, message in good.items():
            self.assertTrue(self.hears(key[0], message), key)
        for state in self.STATES:
            for kind in range(256):
                if (state, kind) in pureftpd.MONITOR_ANSWERS:
                    continue
                for message in (bytes([kind]), bytes([kind, 4]), bytes([kind]) + login[1:], bytes([kind]) * 5000):
                    self.assertFalse(self.hears(state, message), (state, kind, message[:10]))
        self.assertEqual(self.forks, [])

    def test_priv_takes_no_message_that_is_cut_off_or_too_long(self):
        for state, kind in pureftpd.MONITOR_ANSWERS:
            size = {pureftpd.LOGIN: pureftpd.LOGIN_HEAD.size, pureftpd.STARTTLS: pureftpd.STARTTLS_HEAD.size,
                    pureftpd.GRANTED: pureftpd.NUMBERED.size}.get(kind, pureftpd.PLAIN.size)
            for length in range(1, size):
                self.assertFalse(self.hears(state, bytes([kind]) + bytes(length - 1)), (state, kind, length))
            for length in (size + 1, 1000, pureftpd.MESSAGE_MAX, pureftpd.MESSAGE_MAX + 1, 100000):
                if kind != pureftpd.LOGIN:
                    self.assertFalse(self.hears(state, bytes([kind]) + bytes(length - 1)), (state, kind, length))
        self.assertFalse(self.hears("SERVER", bytes([pureftpd.LOGIN]) + bytes(pureftpd.MESSAGE_MAX)))

    def test_priv_keeps_no_descriptor_that_was_not_asked_for(self):
        pair, other = socket.socketpair()
        with tempfile.TemporaryFile() as file, socket.socket() as sock, pair, other:
            for state, kind in [*pureftpd.MONITOR_ANSWERS, ("SESSION", 99)]:
                for fds in ([file], [sock], [pair], [file, sock], [sock] * 200):
                    for message in (pureftpd.PLAIN.pack(kind, 4), pureftpd.NUMBERED.pack(kind, 3, 0), bytes([kind]) + bytes(40)):
                        self.hears(state, message, [one.fileno() for one in fds])
                        self.check_files(file, sock, pair)
        self.assertNotIn("SERVER", self.forks)

    def check_files(self, *ours):
        """Nothing but the three files of the test and what setUp counted, and the selector."""
        names = list(proc_fds(os.getpid()).values())
        for one in ours:
            self.assertEqual(names.count(os.readlink("/proc/self/fd/%d" % one.fileno())), 1, names)

    def test_priv_survives_noise(self):
        noise = random_bytes()
        for number in range(2000):
            kind = number % 24
            message = bytes([kind]) + next(noise)
            self.hears(self.STATES[number % 4], message)
        self.assertEqual([line for line in self.log.lines if "bug" in line], [])

    def test_a_login_must_bring_a_clients_socket(self):
        login = pureftpd.login_message(pureftpd.LoginRequest(1, b"a", b"b", pureftpd.Negotiated(), b""))
        pair, other = socket.socketpair()
        with tempfile.TemporaryFile() as file, pair, other, socket.socket(type=socket.SOCK_DGRAM) as datagrams:
            reader, writer = os.pipe()
            for fds in ([file.fileno()], [pair.fileno()], [datagrams.fileno()], [reader]):
                self.assertFalse(self.hears("SERVER", login, fds), fds)
            os.close(reader), os.close(writer)
        with socket.socket() as unconnected:                # a client that has gone meanwhile is no offence
            self.assertTrue(self.hears("SERVER", login, [unconnected.fileno()]))
        self.assertTrue(self.hears("SERVER", login))        # nor is one that PRIV had no descriptor for
        self.assertEqual(self.forks, [])

    def test_login_messages_are_read_to_the_last_byte(self):
        request = pureftpd.LoginRequest(0xFFFFFFFF, b"u" * pureftpd.USER_MAX, b"p" * pureftpd.PASSWORD_MAX,
                                        pureftpd.Negotiated(True, 5, True, True, b"c"), b"n" * pureftpd.PENDING_MAX)
        message = pureftpd.login_message(request)
        again = pureftpd.login_parse(message)
        self.assertEqual((again.id, again.user, again.password, again.pending), (request.id, request.user, request.password,
                                                                                request.pending))
        for wrong in (message[:-1], message + b"x", message[:pureftpd.LOGIN_HEAD.size], b"", message[:3], b"\x07" + message[1:]):
            with self.assertRaises(pureftpd.MessageError):
                pureftpd.login_parse(wrong)
        longer = pureftpd.LOGIN_HEAD.pack(pureftpd.LOGIN, 1, 0, 0, pureftpd.USER_MAX + 1, 0, 0, 0, 0)
        with self.assertRaises(pureftpd.MessageError):
            pureftpd.login_parse(longer + b"x" * (pureftpd.USER_MAX + 1))
        for user, password in ((b"u" * (pureftpd.USER_MAX + 1), b""), (b"", b"p" * (pureftpd.PASSWORD_MAX + 1))):
            with self.assertRaises(ValueError):
                pureftpd.login_message(pureftpd.LoginRequest(1, user, password, pureftpd.Negotiated(), b""))

    def test_server_ends_when_priv_talks_nonsense(self):
        noise = random_bytes()
        for message in [bytes([kind]) for kind in range(256)] + [next(noise) for _ in range(300)]:
            ours, theirs = pureftpd.channel_pair()
            server = pureftpd.Server(self.options, self.log, ours, [], {}, pureftpd.Defender(), None)
            theirs.send(message)
            server.on_channel(ours)
            for sock in (theirs, ours):
                sock.close()
            server.selector.close()
            os.close(server.spare)
            if not (message[0] in pureftpd.SERVER_MESSAGES and len(message) in (2, pureftpd.NUMBERED.size)) \
                    and message[0] not in (pureftpd.CONSULT, pureftpd.JOINED):
                self.assertFalse(server.running, message)


def random_bytes():
    """Byte strings of up to 80 bytes, the same in each run."""
    state = 4711
    while True:
        state = (state * 6364136223846793005 + 1442695040888963407) % (1 << 64)
        yield (state.to_bytes(8, "big") * 10)[:state >> 33 & 63] or b"\0"


class ProcessNonsense(ProcExam):
    """The same with whole servers: a session, or SERVER, that has been taken over."""

    def test_a_session_that_talks_nonsense_is_cut_off_and_nobody_else(self):
        messages = (b"\xff", b"\x01" * 9000, b"\x05", b"\x05\x09", b"\x06\x04\x00")
        server = self.live(patches=NONSENSE % (messages, "self.entry.channel", "Session", "Session"))
        pids, bob = {server.server()}, self.visit(server)
        for number in range(1, len(messages) + 1):
            client = self.enter_anyhow(server)
            until(lambda: server.count("closing the channel of SESSION") == number, server)
            self.assertTrue(client.reply()[0] in (421, 230))
        self.assertEqual(bob.code("USER bob"), 331)
        until(lambda: set(server.titles()) == pids, server)
        self.assertEqual((server.entries(), server.count("bug:")), ([], 0))

    def enter_anyhow(self, server):
        client = self.visit(server)
        client.code("USER alice")
        client.send(b"PASS secret\r\n")
        return client

    def test_a_server_that_talks_nonsense_is_replaced(self):
        server = self.live(patches=NONSENSE % ((b"\xff\xff", None), "self.channel", "Server", "Server")
                           + "pureftpd.SERVER_RESTART_SECONDS = 0.01")
        server.wait_for("closing the channel of SERVER")
        server.wait_for("starting it again")
        until(lambda: server.those("SERVER"), server)
        self.assertEqual(self.enter(server).code("NOOP"), 200)


# Processes of that class, the first, the second and so on, send one of these messages before they begin; None: nothing.
NONSENSE = """
count = os.open("count", os.O_RDWR | os.O_CREAT | os.O_APPEND, 0o666)
os.dup2(count, 30); os.close(count)
pureftpd.close_others, close_others = lambda keep: close_others([*keep, 30]), pureftpd.close_others
def nonsense(run):
    def first(self):
        messages = %r
        os.write(30, b"x")
        number = os.fstat(30).st_size - 1
        if number < len(messages) and messages[number] is not None:
            %s.send(messages[number])
        run(self)
    return first
pureftpd.%s.run = nonsense(pureftpd.%s.run)
"""


class ProcessStops(ProcExam):
    """SIGTERM: nobody is let in, who is idle hears 421, what is under way may finish, then everything is gone."""

    def test_transfers_finish_and_all_others_are_told(self):
        server = self.live()
        visitor, idle, down, up = self.visit(server), self.enter(server), self.enter(server), self.enter(server)
        ends = self.downloading(server, down), self.uploading(up)
        server.process.terminate()
        for client in (visitor, idle):
            self.assertIn(b"shutting down", client.reply()[1])
            self.assertTrue(client.at_end())
        until(lambda: not server.those("SERVER"), server)
        until(lambda: self.refused(server), server)
        self.assertIsNone(server.process.poll())
        self.assertGreaterEqual(self.drained(ends[0]), (64 << 20) - 1000)
        ends[1].sendall(b"y")
        for data, client in zip(ends, (down, up)):
            data.close()
            self.assertEqual([client.reply()[0], client.reply()[0]], [226, 421])
        self.assertEqual(self.content("up"), b"x" * 1000 + b"y")
        self.assertEqual(server.ended(), 0)
        self.assertEqual((os.path.exists(server.pidfile), server.entries()), (False, []))

    def test_the_grace_has_an_end(self):
        server = self.live(patches="pureftpd.STOP_SECONDS = 0.3")
        client = self.enter(server)
        self.downloading(server, client)                    # and never reads it
        server.process.terminate()
        self.assertEqual(server.ended(), 0)
        self.assertIn(client.reply()[0], (421, 426))
        self.assertEqual((os.path.exists(server.pidfile), server.entries()), (False, []))

    def test_who_does_not_listen_is_killed(self):
        server = self.live(patches=HANGING)
        client = self.visit(server)
        client.code("USER alice")
        client.send(b"PASS secret\r\n")
        server.wait_for("checking")
        session = self.enter(server, "bob")
        os.kill([pid for pid in server.those("IDLE")][-1], signal.SIGSTOP)
        server.process.send_signal(signal.SIGINT)
        server.process.send_signal(signal.SIGTERM)
        self.assertEqual(server.ended(), 0)
        self.assertTrue(session.at_end())

    def test_a_pid_file_of_somebody_else_stays(self):
        server = self.live()
        with open(server.pidfile) as file:
            self.assertEqual(file.read(), "%d\n" % server.pid)
        with open(server.pidfile, "w") as file:
            file.write("1\n")
        server.process.terminate()
        self.assertEqual(server.ended(), 0)
        self.assertTrue(os.path.exists(server.pidfile))


class ProcessReloads(ProcExam):
    """SIGHUP: everything anew for those who come; nothing changes for those who are here, or when there is a mistake."""

    def configured(self, text, **more):
        """A server whose options are in a file."""
        self.config = os.path.join(tempfile.mkdtemp(dir=self.place), "conf")
        self.write(text)
        return self.live(self.config, **more)

    def write(self, text):
        with open(self.config, "w") as file:
            file.write(text)

    def reload(self, server, text=None, line="The configuration was read again"):
        if text is not None:
            self.write(text)
        before = server.count(line)
        server.process.send_signal(signal.SIGHUP)
        until(lambda: server.count(line) > before, server)

    def test_limits_change_and_sessions_stay(self):
        server = self.configured("MaxClientsNumber 1\n")
        session = self.enter(server)
        self.assertTrue(self.turned_away(server))
        self.reload(server, "# more\nMaxClientsNumber 2\n")
        second = until(lambda: self.come_in(server), server)
        self.assertTrue(self.turned_away(server))
        self.reload(server, "MaxClientsNumber 3\n")
        until(lambda: self.come_in(server), server)
        self.assertEqual((session.code("NOOP"), second.code("NOOP")), (200, 200))
        until(lambda: len(server.those("SERVER")) == 1, server)

    def test_what_the_log_shows_and_an_upload_script(self):
        server = self.configured("# nothing\n")
        self.reload(server, "VerboseLog yes\nLogPID yes\nCallUploadScript yes\n")
        client = self.enter(server)
        self.assertEqual(client.store("STOR file", b"x")[0], 226)
        server.wait_for(r"pure-ftpd\[\d+\]: \(alice@127\.0\.0\.1\) \[DEBUG\] Command \[stor\] \[file\]")
        self.assertEqual(server.count("upload script will not be called"), 0)
        os.rename(server.state, tempfile.mktemp(dir=self.place))            # as a cleaner does
        self.reload(server)
        self.assertEqual(self.enter(server).store("STOR file", b"x")[0], 226)
        self.assertEqual(server.count("upload script will not be called"), 0)

    @unittest.skipUnless(OPENSSL, "needs openssl(1)")
    def test_tls_is_switched_off_before_a_visitor_wants_it(self):
        certificate = TlsExam.make_certificate("off2", path=os.path.join(self.place, "off2.pem"))
        server = self.configured("TLS 1\nCertFile %s\n" % certificate)
        wanting, other = self.visit(server), self.visit(server)
        self.assertEqual(other.code("USER alice"), 331)
        self.reload(server, "TLS 0\n")
        self.assertEqual(wanting.code("AUTH TLS"), 234)
        self.assertTrue(wanting.at_end())
        self.assertEqual(other.code("PASS secret"), 230)

    @unittest.skipUnless(OPENSSL and HAS_PROC, "needs openssl(1) and /proc")
    def test_a_mistake_leaves_no_descriptors(self):
        certificate = TlsExam.make_certificate("reload", path=os.path.join(self.place, "reload.pem"))
        text = "TLS 1\nCertFile %s\n" % certificate
        server = self.configured(text)
        before = proc_fds_at_rest(server.process.pid)
        for _ in range(3):
            self.reload(server, text + "TLSBind 192.0.2.77,2990\n", "The old configuration stays")
            self.reload(server, text + "FortunesFile /nonexistent\n", "The old configuration stays")
        until(lambda: len(proc_fds(server.process.pid)) <= before, server)

    @unittest.skipUnless(OPENSSL, "needs openssl(1)")
    def test_tls_is_switched_off_while_clients_log_in(self):
        """They go on, each with tickets of its own."""
        certificate = TlsExam.make_certificate("off", path=os.path.join(self.place, "off.pem"))
        server = self.configured("TLS 1\nTLSSessionReuse on\nCertFile %s\n" % certificate)
        clients = []
        for _ in range(2):
            client = TlsClient(server.connect())
            self.addCleanup(client.close)
            client.reply()
            client.secure()
            self.assertEqual(client.code("USER alice"), 331)
            clients.append(client)
        self.reload(server, "TLS 0\n")
        for client in clients:
            self.assertEqual(client.code("PASS secret"), 230)
            client.protect()
        for whose, code in ((0, 226), (1, 522)):
            with clients[0].data() as data:
                self.assertEqual(clients[0].code("NLST"), 150)
                data.tls = clients[whose].context.wrap_socket(data.sock, session=clients[whose].sock.session)
                with contextlib.suppress(OSError):
                    while data.recv(100):
                        pass
            self.assertEqual(clients[0].reply()[0], code)

    def test_visitors_of_before_are_served_till_they_go(self):
        server = self.live()
        typing, gone = self.visit(server), self.visit(server)
        self.reload(server)
        self.reload(server)
        gone.close()
        self.assertEqual((typing.code("USER alice"), typing.code("PASS secret")), (331, 230))
        until(lambda: len(server.those("SERVER")) == 1, server)
        self.assertEqual(typing.code("PWD"), 257)
        self.assertEqual(self.enter(server).code("NOOP"), 200)

    def test_sockets_come_and_go(self):
        first, second = self.free_port(), self.free_port()
        server = self.configured("Bind 127.0.0.1,%d\n" % first, listen=None)
        self.assertEqual(server.port, first)
        session = self.enter(server)
        listening = {name for name in proc_fds(server.pid).values() if tcp_sockets().get(name, "?")[0] == "0A"}
        self.reload(server, "Bind 127.0.0.1,%d\nBind 127.0.0.1,%d\n" % (first, second))
        self.assertLess(listening, set(proc_fds(server.pid).values()))              # the old socket is the same
        for server.port in (first, second):
            self.enter(server)
        self.reload(server, "Bind 127.0.0.1,%d\n" % second)
        self.enter(server)
        server.port = first
        until(lambda: self.refused(server), server)
        self.assertEqual(session.code("NOOP"), 200)

    def test_users_come_from_the_new_database(self):
        server = self.configured("PureDB %s\n" % self.users, users=False)
        session = self.enter(server)
        other = os.path.join(self.place, "other.pdb")
        hashed = pureftpd.crypt_in_python(b"secret", b"$1$saltsalt$")
        with open(other, "wb") as file:
            record = b"%s:%d:%d::%s/./" % (hashed, EXAM_UID, EXAM_UID, os.fsencode(self.home))
            file.write(pureftpd.puredb_build([(b"carol", record)]))
        self.reload(server, "PureDB %s\n" % other)
        self.enter(server, "carol")
        client = self.visit(server)
        self.assertEqual((client.code("USER alice"), client.code("PASS secret"), session.code("NOOP")), (331, 530, 200))

    def test_a_mistake_keeps_the_old_configuration(self):
        with socket.create_server(("127.0.0.1", 0)) as taken:
            directory = tempfile.mkdtemp(dir=self.place)
            base = "Bind 127.0.0.1,0\nStateDir %s/state\nPIDFile %s/pid\nPureDB %s\n" % (directory, directory, self.users)
            server = self.configured(base, users=False, command=[*ProcessStarts.PLAIN, "-f", "stderr", "-H"])
            before = server.titles(), proc_fds_at_rest(server.pid)
            for text, hint in ((base + "MaxClientsNumber many\n", "conf:5: .*many"),
                               ("\nNoSuchThing 1\n", "conf:2: NoSuchThing"),
                               (base + "Bind 127.0.0.1,%d\n" % taken.getsockname()[1], "another server has it"),
                               ("StateDir %s/elsewhere\n" % self.place, "statedir"),
                               (base + "FortunesFile /nonexistent\n", "-F /nonexistent"),
                               (base + "\xff\0\n", "conf:5"),
                               ("Include %s\n" % self.config, "conf")):
                with self.subTest(text):
                    self.reload(server, text, "The old configuration stays: .*" + hint)
            os.unlink(self.config)
            self.reload(server, line="The old configuration stays: .*conf")
            until(lambda: len(proc_fds(server.pid)) <= before[1], server)
            self.assertEqual(server.titles(), before[0])
            self.assertEqual((self.enter(server).code("NOOP"), server.count("bug:")), (200, 0))
            self.reload(server, base)

    def test_a_working_directory_that_is_gone_keeps_the_old_configuration(self):
        gone = os.path.join(self.place, "gone")
        os.mkdir(gone)
        server = self.live(cwd=gone)
        os.rmdir(gone)
        self.reload(server, line="The old configuration stays|was read again")
        self.assertEqual(self.enter(server).code("NOOP"), 200)

    def test_a_fork_that_fails_is_tried_again(self):
        server = self.live(patches=UNFORKABLE + "pureftpd.SERVER_RESTART_SECONDS = 0.01")
        visitor, first = self.visit(server), server.server()
        self.reload(server, line="cannot fork SERVER")
        until(lambda: [pid for pid in server.those("SERVER") if pid != first], server)
        until(lambda: self.come_in(server), server)
        visitor.close()
        until(lambda: first not in server.titles(), server)             # it has been told to leave
        self.assertEqual(self.enter(server).code("NOOP"), 200)


# The second fork of PRIV fails.
UNFORKABLE = """
fork, forks = os.fork, []
def unforkable():
    forks.append(1)
    if len(forks) == 2:
        raise BlockingIOError(11, "Resource temporarily unavailable")
    return fork()
os.fork = unforkable
"""


class ProcessSurroundings(ProcExam):
    """What changes, goes and hangs around a server that runs."""

    def daemon_of_syslog(self, path):
        daemon = deadline_socket(socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM))
        self.addCleanup(daemon.close)
        daemon.bind(path)
        os.chmod(path, 0o777)
        return daemon

    def heard(self, daemon, pattern):
        while not re.search(pattern, daemon.recv(4096)):
            pass

    def guess(self, server):
        client = self.visit(server)
        self.assertEqual((client.code("USER alice"), client.code("PASS wrong")), (331, 530))

    def test_syslogd_is_started_again(self):
        path = os.path.join(tempfile.mkdtemp(dir=self.place), "log")
        os.chmod(os.path.dirname(path), 0o755)
        daemon = self.daemon_of_syslog(path)
        server = self.live("-f", "ftp", patches="""
pureftpd.SYSLOG_SOCKETS = (%r,)
announce = pureftpd.announce
def said(setup, listeners):
    announce(setup, listeners)
    os.write(2, b"Listening on x port %%d\\n" %% listeners[0].sock.getsockname()[1])
pureftpd.announce = said
""" % path)
        self.guess(server)
        self.heard(daemon, rb"WARNING\] Authentication failed for user \[alice\]")
        for _ in range(2):
            daemon.close()
            os.unlink(path)
            daemon = self.daemon_of_syslog(path)
            self.guess(server)
            self.heard(daemon, rb"WARNING\] Authentication failed for user \[alice\]")
            self.visit(server)
            self.heard(daemon, rb"INFO\] New connection from")                  # SERVER has the new socket, too

    def test_a_statedir_that_was_cleaned_away(self):
        server = self.live()
        for _ in range(2):
            os.rename(server.state, tempfile.mktemp(dir=self.place))
            client = self.enter(server)
            self.assertEqual(len(server.entries()), 1)
            self.assertEqual(stat.S_IMODE(os.stat(server.state).st_mode), 0o700)
            client.close()
            until(lambda: not server.entries(), server)

    @unittest.skipUnless(OPENSSL, "needs openssl(1)")
    def test_tls_and_a_statedir_that_was_cleaned_away(self):
        server = self.live("-Y", "1", "-2", TlsExam.make_certificate("gone", path=os.path.join(self.place, "gone.pem")))
        os.rename(server.state, tempfile.mktemp(dir=self.place))
        client = TlsClient(server.connect())
        self.addCleanup(client.close)
        client.reply()
        client.secure()
        self.assertEqual(client.login(), 230)

    @unittest.skipUnless(ROOT, "needs root")
    def test_a_home_that_its_user_may_not_enter(self):
        server = self.live()
        for user in "alice", "bob":                         # locked in, and not
            home = os.path.join(self.place, user)
            os.chown(home, 0, 0)
            os.chmod(home, 0o700)
            client = self.visit(server)
            self.assertEqual((client.code("USER " + user), client.code("PASS secret")), (331, 421))
            server.wait_for(r"\[ERROR\] Login not possible for user \[%s\]: the home %s/? of %s: Permission denied" % (user, home, user))

    def test_a_login_that_hears_no_alarm_clock(self):
        """As one that waits for a disk: nobody else waits for it, and it does not count as one that is checked."""
        server = self.live(patches=HANGING + """
import signal
alarm = signal.alarm
signal.alarm = lambda seconds: None
pureftpd.LOGIN_CHECK_SECONDS, pureftpd.LOGIN_CHECKS = -1.5, 1
""")
        client, other = self.visit(server), self.visit(server)
        for visitor, name in (client, "alice"), (other, "bob"):
            visitor.code("USER " + name)
        client.send(b"PASS secret\r\n")
        server.wait_for("checking")
        self.assertEqual(other.code("PASS secret"), 230)
        self.assertEqual(client.reply()[0], 421)
        server.wait_for(r"A login from 127\.0\.0\.1 does not end")

    @unittest.skipUnless(OPENSSL, "needs openssl(1)")
    def test_visitors_that_begin_tls_at_a_new_configuration(self):
        certificate = TlsExam.make_certificate("begin", path=os.path.join(self.place, "begin.pem"))
        server = self.live("-Y", "1", "-2", certificate)
        clients = [TlsClient(server.connect()) for _ in range(3)]
        for client in clients:
            self.addCleanup(client.close)
            client.reply()
        server.process.send_signal(signal.SIGHUP)
        server.wait_for("was read again")
        until(lambda: len(server.those("SERVER")) == 2, server)
        os.kill(server.pid, signal.SIGSTOP)                 # the old SERVER says what it has to say, and ends
        try:
            self.assertEqual([client.code("AUTH TLS") for client in clients], [234] * 3)
            until(lambda: len(server.those("SERVER")) == 1, server)
        finally:
            os.kill(server.pid, signal.SIGCONT)
        for client in clients:
            client.handshake()
            self.assertEqual(client.login(), 230)

    def test_which_log_is_which_when_one_cannot_be_opened(self):
        place = tempfile.mkdtemp(dir=self.place)
        missing, there = os.path.join(place, "missing", "clf"), os.path.join(place, "json")
        client = self.enter(self.live("-O", "clf:" + missing, "-O", "json:" + there, patches="pureftpd.LOGS_SECONDS = -1"))
        self.assertEqual(client.store("STOR one", b"x")[0], 226)
        os.mkdir(os.path.dirname(missing))
        os.rename(there, there + ".1")
        self.assertEqual(client.store("STOR two", b"x")[0], 226)
        with open(there) as file:
            self.assertEqual([json.loads(line)["path"][-3:] for line in file], ["two"])
        self.assertFalse(os.path.exists(missing))

    def test_a_super_servers_client_and_a_signal(self):
        with socket.create_server(("127.0.0.1", 0)) as listener:
            client = ExamClient(deadline_socket(socket.create_connection(listener.getsockname())))
            self.addCleanup(client.close)
            theirs = listener.accept()[0]
        with theirs:
            server = self.live(listen=None, stdin=theirs, ready=None)
        self.assertEqual(client.reply()[0], 220)
        server.process.send_signal(signal.SIGHUP)
        for _ in range(20):
            self.assertEqual(client.code("NOOP"), 200, client.exchange())
            select.select([], [], [], 0.005)
        self.assertEqual(client.code("QUIT"), 221, client.exchange())
        self.assertEqual(server.ended(), 0)

    def test_what_whoever_starts_a_server_leaves_it(self):
        """Nothing at 0, 1 and 2, SIGCHLD ignored, SIGTERM blocked."""
        launch = """
import os, signal, sys
signal.signal(signal.SIGCHLD, signal.SIG_IGN)
signal.pthread_sigmask(signal.SIG_BLOCK, (signal.SIGTERM, signal.SIGCHLD, signal.SIGHUP))
os.dup2(2, 9)
os.closerange(0, 3)
os.execv(sys.argv[1], sys.argv[1:])
"""
        directory = tempfile.mkdtemp(dir=self.place)
        server = self.live("-S", "127.0.0.1,0", "-f", "stderr", "--statedir", directory + "/state", "-g", directory + "/pid",
                           command=[sys.executable, "-c", launch, sys.executable, pureftpd.__file__], ready=None)
        until(lambda: server.those("SERVER"))
        held = proc_fds(server.pid).values()
        server.port, = (row[1] for name, row in tcp_sockets().items() if name in held and row[0] == "0A")
        client = self.enter(server)
        for pid in server.those("IDLE"):
            names = [os.readlink("/proc/%d/fd/%d" % (pid, fd)) for fd in range(3)]
            self.assertEqual(set(names), {"/dev/null"})
        client.close()
        until(lambda: not server.those("IDLE"))             # it hears of its children's ends, and of SIGTERM
        server.process.terminate()
        self.assertEqual(server.process.wait(EXAM_SECONDS), 0)

    def test_a_directory_that_is_gone(self):
        gone = tempfile.mkdtemp(dir=self.place)
        done = subprocess.run([sys.executable, "-c", "import os, sys; os.rmdir(os.getcwd()); os.execv(sys.argv[1], sys.argv[1:])",
                               sys.executable, pureftpd.__file__, "-S", "127.0.0.1,0", "-f", "none"], cwd=gone,
                              stdout=subprocess.PIPE, stderr=subprocess.PIPE, timeout=EXAM_SECONDS)
        self.assertEqual((done.returncode, done.stderr), (
            1, b"pure-ftpd: the current directory: No such file or directory; start in another one\n"))

    def test_a_stdin_that_is_a_socket_of_a_program(self):
        ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_STREAM)
        with ours, theirs:
            server = self.live(stdin=theirs)
            self.assertEqual(self.enter(server).code("NOOP"), 200)


# As systemd does: a socket as descriptor 3, and how many there are.
SYSTEMD_LAUNCH = """
import os, sys
os.dup2(int(sys.argv[1]), 3)
os.set_inheritable(3, True)
os.execve(sys.argv[3], sys.argv[3:], dict(os.environ, LISTEN_PID=str(os.getpid()), LISTEN_FDS=sys.argv[2]))
"""


class ProcessStarts(ProcExam):
    """The ways to start a server, and not to start it."""

    PLAIN = [*EXAM_PYTHON, "-c", EXAM_WRAPPER % ""]

    def environment(self):
        return dict(os.environ, PYTHONPATH=EXAM_PATH, FTP_ANON_DIR=self.ftp, TZ="UTC", XDG_RUNTIME_DIR=self.place)

    def test_the_configuration_file_alone(self):
        directory = tempfile.mkdtemp(dir=self.place)
        config = os.path.join(directory, "pure-ftpd.conf")
        more = os.path.join(directory, "more.conf")
        with open(config, "w") as file:
            file.write("# everything\nBind 127.0.0.1,0\nInclude %s\n\nDontResolve yes\nMaxClientsNumber 2\n" % more)
        with open(more, "w") as file:
            file.write("PureDB %s\nPIDFile %s/pid\n" % (self.users, directory))
            file.write("SyslogFacility stderr\nStateDir %s/state\n" % directory)
        server = self.live(config, command=self.PLAIN, users=False)
        self.assertEqual(self.enter(server).code("NOOP"), 200)
        self.visit(server)
        self.assertIn(b"2 users", self.turned_away(server))
        with open(os.path.join(directory, "pid")) as file:
            self.assertEqual(file.read(), "%d\n" % server.pid)
        server.state = os.path.join(directory, "state")
        self.assertEqual(len(server.entries()), 1)

    def test_the_command_line_and_a_configuration_file_after_it(self):
        config = os.path.join(tempfile.mkdtemp(dir=self.place), "conf")
        with open(config, "w") as file:
            file.write("MaxClientsNumber 1\nNoAnonymous yes\n")
        server = self.live("-E", config)
        self.visit(server)
        self.assertTrue(self.turned_away(server))

    def test_with_every_line_of_the_log(self):
        """What the log needs must be there in the empty root directory, too."""
        server = self.live("-d", "-d", "-1")
        client = self.enter(server)
        client.say(b"SIZE \xff\x01\xc3\xa9 \xe2\x80\xae")
        self.assertEqual((client.code("SYST"), client.code("QUIT")), (215, 221))
        line = server.wait_for(r"Command \[size\].*").group(0)
        self.assertIn("\\xff", line)
        until(lambda: server.count("Reply \\[221"), server)
        self.assertEqual(server.count("bug:"), 0, server.lines[-20:])
        self.assertTrue(all("pure-ftpd[" in line for line in server.lines), server.lines[-20:])

    def background(self, *switches, cwd):
        """(exit status, stderr) of the first process of a server that is started with -B in `cwd`."""
        done = subprocess.run(
            [*self.PLAIN, "-B", "-f", "none", "-H", "-l", "puredb:" + self.users, "--statedir", os.path.join(cwd, "state"),
             *switches], cwd=cwd, env=self.environment(), stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL,
            stderr=subprocess.PIPE, timeout=EXAM_SECONDS)
        return done.returncode, done.stderr.decode()

    def test_in_the_background_with_relative_names(self):
        cwd = tempfile.mkdtemp(dir=self.place)
        with open(os.path.join(cwd, "conf"), "w") as file:
            file.write("MaxClientsNumber 1\n")
        port = self.free_port()
        self.assertEqual(self.background("-S", "127.0.0.1,%d" % port, "-g", "pid", "conf", cwd=cwd), (0, ""))
        with open(os.path.join(cwd, "pid")) as file:                    # written before the first process ends
            pid = int(file.read())
        self.addCleanup(self.end, pid)
        self.assertEqual((os.readlink("/proc/%d/cwd" % pid), os.getsid(pid)), ("/", pid))
        self.assertEqual({proc_fds(pid)[fd] for fd in (0, 1, 2)}, {"/dev/null"})
        with self.greeted(port, 220):
            self.greeted(port, 421).close()
            with open(os.path.join(cwd, "conf"), "w") as file:
                file.write("MaxClientsNumber 2\n")
            os.kill(pid, signal.SIGHUP)
            until(lambda: self.let_in(port))
        os.kill(pid, signal.SIGTERM)
        self.assertTrue(ended(pid))
        self.assertFalse(os.path.exists(os.path.join(cwd, "pid")))

    @staticmethod
    def end(pid):
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, signal.SIGTERM)
            ended(pid)

    def greeted(self, port, code):
        sock = deadline_socket(socket.create_connection(("127.0.0.1", port)))
        self.assertEqual(ExamClient(sock).reply()[0], code)
        return sock

    def let_in(self, port):
        with contextlib.closing(deadline_socket(socket.create_connection(("127.0.0.1", port)))) as sock:
            return ExamClient(sock).reply()[0] == 220

    def test_mistakes_end_the_start_with_one_line(self):
        directory = tempfile.mkdtemp(dir=self.place)
        config = os.path.join(directory, "conf")
        with open(config, "w") as file:
            file.write("MaxClientsNumber 5\nMaxIdleTime soon\n")
        taken = socket.create_server(("127.0.0.1", 0))
        self.addCleanup(taken.close)
        here = "-S", "127.0.0.1,0"
        port = taken.getsockname()[1]
        table = [
            (["-S", "127.0.0.1,%d" % port], "port %d.*in use" % port),
            (["-S", "192.0.2.1,0"], "192.0.2.1"),
            ([*here, "-S", "2001:db8::77,0"], "2001:db8::77"),
            ([*here, "--nonsense"], "nonsense"),
            ([*here, "-c", "many"], "-c|maxclientsnumber"),
            ([*here, "-l", "puredb"], "puredb"),
            ([*here, "-l", "magic:x"], "magic"),
            ([*here, "-S"], "-S"),
            ([*here, "-p", "9:1"], "9:1|-p"),
            ([*here, os.path.join(directory, "none")], "none"),
            ([*here, config], "conf:2: "),
            ([*here, config, "more"], "more"),
            ([*here, "-g", "/nonexistent/pid"], "/nonexistent/pid: No such file"),
            ([*here, "-B", "-g", "/nonexistent/pid"], "/nonexistent/pid: No such file"),
            ([*here, "-F", "/nonexistent/f"], "/nonexistent/f"),
            ([*here, "--statedir", "/dev/null/x"], "/dev/null/x"),
            ([*here, "-Y", "1", "-2", "/nonexistent.pem"], "/nonexistent.pem"),
        ]
        if not ROOT:
            table += [(["-S", "127.0.0.1,21"], "below 1024|in use"), ([*here, "-l", "unix"], "only root"), ([*here, "-E"], "-E")]
        processes = []
        for number, (switches, _) in enumerate(table):
            own = os.path.join(directory, "%d" % number)
            base = ["-f", "none", "--statedir", own + ".state", "-g", own + ".pid"]
            processes.append(subprocess.Popen([*self.PLAIN, *base, *switches], env=self.environment(), stdin=subprocess.DEVNULL,
                                              stdout=subprocess.PIPE, stderr=subprocess.PIPE))
        for process, (switches, pattern) in zip(processes, table):
            with self.subTest(switches):
                try:
                    out, errors = process.communicate(timeout=EXAM_SECONDS)
                except subprocess.TimeoutExpired:
                    process.terminate()
                    process.communicate()
                    raise
                self.assertEqual((process.returncode, out), (1, b""))
                self.assertRegex(errors.decode(), "\\Apure-ftpd: [^\n]*(%s)[^\n]*\n\\Z" % pattern)
        self.assertEqual([name for name in os.listdir(directory) if name.endswith(".pid")], [])

    def test_systemd_hands_sockets_over_and_hears_how_it_goes(self):
        path = os.path.join(self.place, "notify")
        notify = deadline_socket(socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM))
        self.addCleanup(notify.close)
        self.addCleanup(os.unlink, path)
        notify.bind(path)
        os.chmod(path, 0o777)
        listener = socket.create_server(("127.0.0.1", 0))
        self.addCleanup(listener.close)
        directory = tempfile.mkdtemp(dir=self.place)
        server = self.live("-f", "stderr", "--statedir", directory + "/state", "-g", directory + "/pid",
                           command=[sys.executable, "-c", SYSTEMD_LAUNCH, str(listener.fileno()), "1", *self.PLAIN],
                           pass_fds=[listener.fileno()], environment={"NOTIFY_SOCKET": path})
        self.assertEqual(server.port, listener.getsockname()[1])
        self.assertEqual(notify.recv(100), b"READY=1")
        self.assertEqual(self.enter(server).code("NOOP"), 200)
        server.process.send_signal(signal.SIGHUP)
        self.assertRegex(notify.recv(100), rb"\ARELOADING=1\nMONOTONIC_USEC=\d+\Z")
        self.assertEqual(notify.recv(100), b"READY=1")
        self.assertEqual(self.enter(server).code("NOOP"), 200)
        server.process.terminate()
        self.assertEqual(notify.recv(100), b"STOPPING=1")
        self.assertEqual(server.ended(), 0)

    def test_a_socket_of_systemd_for_both_families_is_an_ipv4_clients_too(self):
        listener = socket.socket(socket.AF_INET6, socket.SOCK_STREAM)
        self.addCleanup(listener.close)
        try:
            listener.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 0)
            listener.bind(("::", 0))
        except OSError:
            self.skipTest("no IPv6 here")
        listener.listen(5)
        directory = tempfile.mkdtemp(dir=self.place)
        server = self.live("-f", "stderr", "--statedir", directory + "/state", "-g", directory + "/pid", "-H",
                           command=[sys.executable, "-c", SYSTEMD_LAUNCH, str(listener.fileno()), "1", *self.PLAIN],
                           pass_fds=[listener.fileno()])
        client = self.enter(server)
        for command in "EPSV", "EPSV 1":
            with client.passive(command) as data:
                self.assertEqual(client.fetch("NLST", data)[0], 226)
        self.assertEqual(client.code("EPSV 2"), 522)

    def test_sockets_of_systemd_that_are_none(self):
        pair = socket.socketpair()
        for end in pair:
            self.addCleanup(end.close)
        for count, pattern in (("1", b"must be of TCP"), ("2", b"LISTEN_FDS 2: "), ("x", b"LISTEN_FDS x: "), ("0", b"LISTEN_FDS is 0")):
            with self.subTest(count):
                done = subprocess.run([sys.executable, "-c", SYSTEMD_LAUNCH, str(pair[0].fileno()), count, *self.PLAIN, "-f", "none",
                                       "--statedir", os.path.join(self.place, "state-of-none")],
                                      pass_fds=[pair[0].fileno()], env=self.environment(), stdin=subprocess.DEVNULL,
                                      stdout=subprocess.PIPE, stderr=subprocess.PIPE, timeout=EXAM_SECONDS)
                self.assertEqual(done.returncode, 1)
                self.assertRegex(done.stderr, rb"\Apure-ftpd: [^\n]*%s[^\n]*\n\Z" % pattern)

    def test_a_super_server_starts_one_for_each_client(self):
        for script in (["USER alice", "PASS secret", "PWD", "QUIT"], ["NOOP", "QUIT"], []):
            with self.subTest(script):
                directory = tempfile.mkdtemp(dir=self.place)
                with socket.create_server(("127.0.0.1", 0)) as listener:
                    client = ExamClient(deadline_socket(socket.create_connection(listener.getsockname())))
                    theirs = listener.accept()[0]
                self.addCleanup(client.close)
                with theirs:
                    process = subprocess.Popen(
                        [*self.PLAIN, "-f", "none", "-H", "-l", "puredb:" + self.users, "--statedir", directory + "/state",
                         "-g", directory + "/pid"],
                        stdin=theirs, stdout=theirs, stderr=theirs, env=self.environment(), start_new_session=True)
                self.assertEqual(client.reply()[0], 220)
                codes = [client.code(line) for line in script]
                self.assertEqual(codes, [331, 230, 257, 221][-len(script):] if len(script) == 4 else [200, 221][:len(script)])
                client.close()
                self.assertEqual(process.wait(EXAM_SECONDS), 0)
                with self.assertRaises(ProcessLookupError):
                    os.killpg(process.pid, signal.SIGKILL)
                self.assertEqual(sorted(os.listdir(directory)), ["state"])

    def test_no_module_is_imported_from_beside_the_program(self):
        """Whoever may upload to where pureftpd.py lies must not run code as its user, who may be root."""
        directory = tempfile.mkdtemp(dir=self.place)
        program = os.path.join(directory, "pureftpd.py")
        with open(pureftpd.__file__) as source, open(program, "w") as copy:
            text = source.read()
            copy.write(text)
        names = set(re.findall(r"^ *(?:import|from) ([a-z]\w*)", text, re.M))
        names |= {"encodings", "codecs", "stringprep", "io", "re", "site"}
        for name in names - {"sys"}:
            with open(os.path.join(directory, name + ".py"), "w") as file:
                file.write("import sys\nsys.stderr.write('IMPORTED %s\\n')\nsys.exit(9)\n" % name)
        self.assertTrue({"ssl", "socket", "os", "ctypes", "hashlib"} <= names)
        environment = {key: value for key, value in self.environment().items() if key != "PYTHONPATH"}
        for command in ([sys.executable, "pureftpd.py"], [sys.executable, program], [sys.executable, "./pureftpd.py"]):
            done = subprocess.run([*command, "--version"], cwd=directory, env=environment, timeout=EXAM_SECONDS,
                                  stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
            self.assertEqual((done.returncode, done.stdout), (0, b"pureftpd.py %s\n" % pureftpd.VERSION.encode()))
        server = self.live("-S", "127.0.0.1,0", "-f", "stderr", "--statedir", directory + "/state", "-g", directory + "/pid",
                           "-A", command=[sys.executable, "pureftpd.py"], cwd=directory, environment={"PYTHONPATH": ""})
        client = self.enter(server)
        self.assertEqual(client.store("STOR f", b"content")[0], 226)
        self.assertEqual(client.fetch("LIST")[0], 226)
        wrong = self.visit(server)
        self.assertEqual((wrong.code("USER alice"), wrong.code("PASS wrong")), (331, 530))
        server.process.send_signal(signal.SIGHUP)
        server.wait_for("was read again")
        server.process.terminate()
        self.assertEqual(server.ended(), 0)
        self.assertEqual(server.count("IMPORTED|bug"), 0, server.lines[-20:])

    @unittest.skipIf(ROOT, "the quick start of an ordinary user")
    def test_without_any_option(self):
        with contextlib.ExitStack() as stack:
            try:
                stack.enter_context(socket.create_server(("127.0.0.1", 2121)))
            except OSError:
                self.skipTest("port 2121 is taken")
        directory = tempfile.mkdtemp(dir=self.place)
        with open(os.path.join(directory, "file"), "w") as file:
            file.write("content")
        command = [sys.executable, pureftpd.__file__]
        server = self.live(users=False, cwd=directory, command=command, stdout=subprocess.PIPE,
                           environment={"XDG_RUNTIME_DIR": self.place, "FTP_ANON_DIR": ""},
                           ready=r"Listening on 127.0.0.1 port (2121)")
        self.addCleanup(server.process.stdout.close)
        said = os.read(server.process.stdout.fileno(), 4096).decode()
        self.assertIn("Serving %s, read-only, to anyone who can reach 127.0.0.1 port 2121: "
                      "ftp://127.0.0.1:2121/" % directory, said)
        for switch in ("-S", "--help", "pw useradd"):
            self.assertIn(switch, said)
        for _ in range(2):
            client = self.enter(server, "ftp")
            self.assertEqual(client.fetch("RETR file")[2], b"content")
            self.assertIn(client.store("STOR new", b"x")[0], (550, 553))
            self.assertEqual([client.code(line) for line in ("DELE file", "MKD new", "RNFR file")], [550] * 3)
            server.process.send_signal(signal.SIGHUP)
            server.wait_for("was read again")
        held = proc_fds(server.pid).values()
        self.assertEqual([row[1] for name, row in tcp_sockets().items() if name in held and row[0] == "0A"], [2121])
        self.assertEqual(os.listdir(directory), ["file"])
        server.process.send_signal(signal.SIGINT)
        self.assertEqual(server.ended(), 0)


class Addresses(unittest.TestCase):
    def test_link_local_ones_keep_their_interface(self):
        for name, address in ((("fe80::1", 21, 0, 3), "fe80::1%3"), (("::1", 21, 0, 0), "::1"), (("192.0.2.1", 21), "192.0.2.1")):
            self.assertEqual(pureftpd.address_scoped(name), address)
        self.assertEqual(pureftpd.sockaddr_pack("fe80::1%3", 21)[-4:], struct.pack("=I", 3))
        self.assertEqual(pureftpd.address_normal("fe80::1%3"), "fe80::1")

    def test_a_link_local_address_can_be_bound(self):
        try:
            with open("/proc/net/if_inet6") as file:
                found = [line.split() for line in file if line.startswith("fe80")]
        except OSError:
            found = []
        if not found:
            self.skipTest("no interface here has a link-local address")
        address = socket.inet_ntop(socket.AF_INET6, bytes.fromhex(found[0][0]))
        with socket.socket(socket.AF_INET6, socket.SOCK_STREAM) as listener:
            listener.bind((address, 0, 0, int(found[0][1], 16)))
            listener.listen(1)
            with deadline_socket(socket.socket(socket.AF_INET6, socket.SOCK_STREAM)) as theirs:
                theirs.connect(listener.getsockname())
                client = listener.accept()[0]
                peer = pureftpd.peer_of(client.fileno())
                client.close()
        port = pureftpd.DataPort(None, peer, socket.AF_INET6, (1024, 65535), False)
        self.addCleanup(port.close)
        self.assertGreater(port.listen(), 1023)


class ProcessLogs(unittest.TestCase):
    """-f: syslogd by its socket, stderr, nobody."""

    def test_lines_go_to_syslog(self):
        with tempfile.TemporaryDirectory() as directory, socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as daemon:
            path = os.path.join(directory, "log")
            daemon.bind(path)
            daemon.settimeout(EXAM_SECONDS)
            log = self.log(("/nonexistent", path), "ftp")
            log.who = "alice@192.0.2.1"
            log.info("two\nlines \x1b[1m \udcff \u202e")
            self.assertRegex(daemon.recv(1000), rb"\A<94>\w{3} [ \d]\d \d\d:\d\d:\d\d pure-ftpd: "
                             rb"\(alice@192\.0\.2\.1\) \[INFO\] two\\\S+lines \\x1b\[1m \\xff \\u202e\Z")
            log = self.log((path,), "local3", with_pid=True)
            log.error("x")
            self.assertRegex(daemon.recv(1000), rb"\A<155>.* pure-ftpd\[%d\]: \[ERROR\] x\Z" % os.getpid())
            log.debug("not without -d")
            log.info("y")
            self.assertTrue(daemon.recv(1000).endswith(b"[INFO] y"))

    def test_what_syslogd_does_not_take_is_counted_and_nobody_waits(self):
        with tempfile.TemporaryDirectory() as directory, socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as daemon:
            path = os.path.join(directory, "log")
            daemon.bind(path)
            log = self.log((path,), "ftp")
            for _ in range(5000):
                log.info("x" * 1000)
            self.assertGreater(log.lost, 0)
            daemon.setblocking(False)
            with contextlib.suppress(BlockingIOError):
                while True:
                    daemon.recv(2000)
            lost = log.lost
            log.info("again")
            self.assertIn(b"again (%d lines before this one were lost)" % lost, daemon.recv(2000))
            self.assertEqual(log.lost, 0)

    def test_without_syslogd_lines_go_to_stderr(self):
        reader, writer = os.pipe()
        with open(reader, "rb") as lines:
            saved = os.dup(2)
            os.dup2(writer, 2)
            try:
                self.log(("/nonexistent",), "ftp").notice("here")
                self.log((), "none").error("nowhere")
                self.log((), "stderr").error("and here")
            finally:
                os.dup2(saved, 2)
                os.close(saved)
                os.close(writer)
            self.assertRegex(lines.read(), rb"\A\S+ \S+ pure-ftpd: \[NOTICE\] here\n\S+ \S+ pure-ftpd: \[ERROR\] and here\n\Z")

    def log(self, sockets, *args, **more):
        before, pureftpd.SYSLOG_SOCKETS = pureftpd.SYSLOG_SOCKETS, sockets
        try:
            log = pureftpd.Log(*args, **more)
        finally:
            pureftpd.SYSLOG_SOCKETS = before
        if log.socket is not None:
            self.addCleanup(log.socket.close)
        return log


# ==== Tests: pw ===================================================================================


PW_PURE_PW = next((path for path in ("/opt/pureftpd-orig/usr/bin/pure-pw", shutil.which("pure-pw"))
                if path and os.access(path, os.X_OK)), None)
PURE_FTPD = next((path for path in ("/opt/pureftpd-orig/usr/sbin/pure-ftpd", shutil.which("pure-ftpd"))
                  if path and os.access(path, os.X_OK)), None)
PW_HASH = "$1$12345678$oEitTZYQtRHfNGmsFvTBA/"            # password: test


class Console(io.TextIOWrapper):
    """A standard stream that is no terminal."""

    def __init__(self, data=b""):
        super().__init__(io.BytesIO(data), encoding="utf-8", newline="")

    def bytes(self):
        self.flush()
        return self.buffer.getvalue()


class Pw(unittest.TestCase):
    """Each test has files of its own, and a hash that costs nothing."""

    def setUp(self):
        self.directory = tempfile.mkdtemp()
        self.addCleanup(shutil.rmtree, self.directory)
        self.passwd = os.path.join(self.directory, "pureftpd.passwd")
        self.database = os.path.join(self.directory, "pureftpd.pdb")
        for patch in (mock.patch.dict(os.environ, PURE_PASSWDFILE=self.passwd, PURE_DBFILE=self.database),
                      mock.patch.object(pureftpd, "best_crypt", self.cheap)):
            patch.start()
            self.addCleanup(patch.stop)

    @staticmethod
    def cheap(password, logins, memory):
        return pureftpd.crypt_in_python(password, b"$1$12345678$").decode()

    def pw(self, *words, typed=b"test\ntest\n", code=0):
        """(standard output, standard error) of one command, as bytes and text."""
        output, errors = Console(), Console()
        with mock.patch("sys.stdin", Console(typed)), mock.patch("sys.stdout", output), \
                mock.patch("sys.stderr", errors):
            result = pureftpd.tool_pw(list(words))
        error = errors.bytes().decode()
        self.assertEqual(result, code, error)
        self.assertEqual(error.count("\n"), error.count("pure-pw: "), error)
        return output.bytes(), error

    def add(self, login, *words, **more):
        return self.pw("useradd", login, "-u", "1000", "-g", "1001", "-d", "/home/" + login, *words, **more)

    def original(self, *words, typed=b"test\ntest\n"):
        """(exit code, standard output) of the original's pure-pw."""
        done = subprocess.run([PW_PURE_PW, *words], input=typed, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL,
                              check=False)
        return done.returncode, done.stdout

    def write(self, data):
        with open(self.passwd, "wb") as file:
            file.write(data)

    def read(self, path=None):
        with open(path or self.passwd, "rb") as file:
            return file.read()

    def line(self, login="joe"):
        """The fields of a user, the hash left out."""
        for line in self.read().decode("utf-8", "surrogateescape").splitlines():
            fields = line.split(":")
            if fields[0] == login:
                return ":".join(fields[:1] + fields[2:])
        self.fail(f"{login} is not there")


class Actions(Pw):
    def test_useradd_writes_all_fields(self):
        self.add("joe", "-c", "Joe Doe", "-t", "5", "-T", "6", "-n", "0", "-N", "3", "-q", "1", "-Q", "10", "-y", "4",
                 "-r", "10.0.0.0/8,a.example", "-R", "10.1.1.1", "-i", "192.168.0.1", "-I", "b.example", "-z",
                 "0900-1800")
        self.assertEqual(self.read().decode(), f"joe:{PW_HASH}:1000:1001:Joe Doe:/home/joe/./:6144:5120:1:10:4:0:3145728:"
                         "192.168.0.1:b.example:10.0.0.0/8,a.example:10.1.1.1:900-1800\n")
        self.assertEqual(os.stat(self.passwd).st_mode & 0o7777, 0o600)
        self.add("jim")
        self.assertEqual(self.line("jim"), "jim:1000:1001::/home/jim/./::::::::::::")

    def test_values_of_options(self):
        for words, fields in (
                (("-t", "0", "-T", "0"), "/h/./::::::::::::"), (("-y", "0"), "/h/./::::::::::::"),
                (("-n", "7", "-n", ""), "/h/./::::::::::::"), (("-z", ""), "/h/./::::::::::::"),
                (("-z", "0000-2359"), "/h/./::::::::::::0-2359"), (("-z", "2300-5"), "/h/./::::::::::::2300-5"),
                (("-D", "/h//"), "/h::::::::::::"), (("-D", "/"), "/::::::::::::"), (("-d", "/"), "/./::::::::::::"),
                (("-N", "4294967295"), "/h/./:::::::4503599626321920:::::")):
            with self.subTest(words):
                home = () if words[0].lower() == "-d" else ("-d", "/h/")
                self.pw("useradd", "joe", "-u", "1", "-g", "1", *home, *words)
                self.assertEqual(self.line(), "joe:1:1::" + fields)
                os.unlink(self.passwd)

    def test_bad_values_are_refused_and_change_nothing(self):
        self.add("joe")
        before = self.read()
        for words in (("-t", "5x"), ("-n", "-1"), ("-N", "many"), ("-q", "0"), ("-Q", "0"), ("-y", "1.5"),
                      ("-z", "9-18h"), ("-z", "0900"), ("-z", "0960-1000"), ("-z", "2400-2500"), ("-d", "relative"),
                      ("-d", ""), ("-D", ""), ("-c", "a:b"), ("-c", "a\nb"), ("-c", "a\rb"), ("-d", "/a:b"),
                      ("-d", "/a\nb"), ("-r", "2001:db8::1"), ("-r", "1.2.3.4/99"), ("-R", "a.example,bad_host!!"), ("-i", "300.1.1.1"),
                      ("-i", "a\nb"), ("-C", "0"), ("-M", "0"),
                      ("-C", "1", "-M", "2000"), ("-Y",), ("-t",), ("extra",)):
            for login, action in (("joe", "usermod"), ("jim", "useradd")):
                with self.subTest(words, action=action):
                    _, error = self.pw(action, login, "-u", "1000", "-g", "1", "-d", "/h", *words, code=1)
                    self.assertIn(words[0] if words[0] != "extra" else "extra", error)
        for login in ("a:b", "a\nb", "a\rb", "#joe"):
            with self.subTest(login):
                self.add(login, code=1)
        self.assertEqual(self.read(), before)

    def test_owners_by_name_and_number(self):
        import pwd
        user = next(user for user in pwd.getpwall() if user.pw_uid and user.pw_gid)
        self.pw("useradd", "joe", "-u", user.pw_name, "-D", "/h")
        self.assertEqual(self.line(), f"joe:{user.pw_uid}:{user.pw_gid}::/h::::::::::::")
        self.pw("usermod", "joe", "-u", "77", "-g", "78")
        self.assertEqual(self.line(), "joe:77:78::/h::::::::::::")
        self.pw("usermod", "joe", "-u", user.pw_name, "-g", "78")
        self.assertEqual(self.line(), f"joe:{user.pw_uid}:78::/h::::::::::::")
        for words in (("-u", "root", "-g", "5"), ("-u", "0", "-g", "5"), ("-u", "5", "-g", "0"), ("-u", "4294967295"),
                      ("-u", "no such user", "-g", "5"), ("-u", "5", "-g", "no such group")):
            with self.subTest(words):
                self.pw("useradd", "jim", "-d", "/h", *words, code=32)
                self.pw("usermod", "joe", *words, code=32)

    def test_owner_left_out(self):
        with mock.patch.object(os, "geteuid", lambda: 0):
            self.pw("useradd", "joe", "-d", "/h", code=32)
            self.pw("useradd", "joe", "-d", "/h", "-u", "54321", code=32)
        with mock.patch.object(os, "geteuid", lambda: 4711), mock.patch.object(os, "getegid", lambda: 815):
            self.pw("useradd", "joe", "-d", "/h")
        self.assertEqual(self.line(), "joe:4711:815::/h/./::::::::::::")

    def test_usermod_changes_what_it_was_asked_to_and_moves_the_user_to_the_end(self):
        self.write(b"# comment\njoe:*:1000:1001::/h::::::::\nbroken line\njim:*:5:5::/h\njoe:*:9:9::/second\n")
        self.pw("usermod", "joe", "-t", "2", "-c", "Joe", "-y", "3")
        self.assertEqual(self.read(),
                         b"# comment\nbroken line\njim:*:5:5::/h\njoe:*:1000:1001:Joe:/h::2048:::3:::::::\n")
        self.pw("usermod", "joe", "-t", "", "-c", "", "-y", "0", "-D", "/new", "-n", "5", "-r", "localhost")
        self.assertEqual(self.read().splitlines()[-1], b"joe:*:1000:1001::/new::::::5::::localhost::")
        self.pw("usermod", "joe", "-n", "", "-r", "")
        self.assertEqual(self.read().splitlines()[-1], b"joe:*:1000:1001::/new::::::::::::")

    def test_usermod_repairs_a_broken_field_but_does_not_keep_one(self):
        self.write(b"joe:*:1000:1001::/h::::::::::::always\n")
        _, error = self.pw("usermod", "joe", "-t", "2", code=16)
        self.assertIn("time", error)
        self.pw("usermod", "joe", "-z", "900-1000")
        self.assertEqual(self.line(), "joe:1000:1001::/h::::::::::::900-1000")

    def test_userdel(self):
        self.write(b"joe:*:1:1::/h\njoey:*:1:1::/h\r\njoe:again\n# joe:\nnewline missing")
        self.pw("userdel", "joe")
        self.assertEqual(self.read(), b"joey:*:1:1::/h\r\n# joe:\nnewline missing\n")
        self.pw("userdel", "joe", code=4)

    def test_passwd(self):
        self.add("joe", "-t", "5")
        fields = self.line()
        self.pw("passwd", "joe", typed=b"new\nnew\n")
        self.assertEqual(self.line(), fields)
        stored = pureftpd.passwd_entry(self.read().rstrip())
        self.assertTrue(pureftpd.password_verify(b"new", stored.hash))
        self.assertFalse(pureftpd.password_verify(b"test", stored.hash))

    def test_typing_a_password(self):
        for typed, password in ((b"pw\npw\n", b"pw"), (b"pw\npw", b"pw"), (b"a\nb\npw\npw\n", b"pw"),
                                (b"p w\r\np w\n", b"p w"), (b"1\n2\n3\n4\n\xff\n\xff\n", b"\xff"), (b"\n\n", b"")):
            with self.subTest(typed), mock.patch.object(pureftpd, "best_crypt", return_value=PW_HASH) as hashing:
                output, _ = self.add("joe", typed=typed)
                self.assertEqual(hashing.call_args.args, (password, 8, 64 << 20))
                self.assertTrue(output.startswith(b"Password: \nEnter it again: "))
                os.unlink(self.passwd)
        for typed in (b"", b"a\n", b"a\nb\nc\nd\ne\nf\ng\ng\n"):
            with self.subTest(typed):
                self.add("joe", typed=typed, code=8)
                self.assertFalse(os.path.exists(self.passwd))

    def test_expected_logins_and_memory_reach_the_hash(self):
        with mock.patch.object(pureftpd, "best_crypt", return_value=PW_HASH) as hashing:
            self.add("joe", "-C", "100", "-M", "16")
        self.assertEqual(hashing.call_args.args, (b"test", 100, 16 << 20))
        with mock.patch.object(pureftpd, "best_crypt", side_effect=pureftpd.HashUnsupported("install it")):
            self.add("jim", code=255)

    def test_exit_codes(self):
        self.add("joe")
        gone = os.path.join(self.directory, "gone")
        for code, *words in ((1, "useradd"), (1, "usermod"), (1, "passwd"), (1, "show"), (255, "userdel"),
                             (4, "useradd", "joe", "-u", "1", "-g", "1", "-d", "/h"), (4, "userdel", "jim"),
                             (16, "usermod", "jim"), (16, "passwd", "jim"), (16, "show", "jim"),
                             (64, "useradd", "jim", "-u", "1", "-g", "1"), (2, "mkdb", "-f", gone),
                             (2, "list", "-f", gone), (16, "show", "joe", "-f", gone),
                             (16, "usermod", "joe", "-f", gone), (4, "userdel", "joe", "-f", gone),
                             (255, "mkdb", os.path.join(gone, "pdb")),
                             (4, "useradd", "jim", "-u", "1", "-g", "1", "-d", "/h", "-f", gone + "/passwd")):
            with self.subTest(words):
                self.pw(*words, code=code)

    def test_usage(self):
        for words in ((), ("-h",), ("--help",), ("useradd", "-h"), ("frobnicate",)):
            with self.subTest(words):
                output, error = self.pw(*words)
                self.assertIn(b"usage: pw useradd", output)
                self.assertEqual("frobnicate" in error, "frobnicate" in words)

    def test_m_makes_the_database_and_the_codes_are_added(self):
        self.add("joe", "-m")
        self.assertTrue(pureftpd.puredb_find(self.database, b"joe").startswith(PW_HASH.encode() + b":1000:1001:"))
        other = os.path.join(self.directory, "other.pdb")
        self.pw("usermod", "joe", "-t", "1", "-F", other, "-m")
        self.assertIn(b":1024:", pureftpd.puredb_find(other, b"joe"))
        self.assertNotIn(b":1024:", pureftpd.puredb_find(self.database, b"joe"))
        self.pw("passwd", "joe", "-m")
        self.pw("userdel", "joe", "-m")
        self.assertIsNone(pureftpd.puredb_find(self.database, b"joe"))
        self.pw("userdel", "joe", "-m", "-f", os.path.join(self.directory, "gone"), code=4 | 2)

    def test_mkdb_takes_the_database_in_any_place(self):
        self.write(b"# no\n\nno colon\nnothing:\nx:1\nx:2\nz\0:1\ncr:1\r\n:empty")
        names = [os.path.join(self.directory, name) for name in ("a", "b", "c")]
        for words in ((names[0],), ("-F", names[1]), ("-f", self.passwd, names[2]), ()):
            _, error = self.pw("mkdb", *words)
            self.assertIn("line 7: left out", error)
        for path in (*names, self.database):
            self.assertEqual([pureftpd.puredb_find(path, key) for key in (b"x", b"cr", b"", b"nothing", b"# no")],
                             [b"1", b"1", b"empty", None, None])

    def test_a_line_that_the_original_would_cut_stays_out_of_the_database(self):
        self.write(b"joe:" + b"x" * 2043 + b"\njim:" + b"x" * 2042 + b"\n")
        _, error = self.pw("mkdb")
        self.assertIn("line 1:", error)
        self.assertEqual(len(pureftpd.puredb_find(self.database, b"jim")), 2042)
        self.assertIsNone(pureftpd.puredb_find(self.database, b"joe"))
        self.add("long", "-r", "x" * 2000, code=1)

    def test_list_and_show(self):
        self.write(b"joe:*:4711:1::/h::::1:2:3:::a.example\njim:x:0:1::/h\nj\xf6:x:1:1:n\xe4me:/\xff\n# c\n")
        output, error = self.pw("list")
        self.assertEqual(output, b"joe\t/h\t\nj\xf6\t/\xff\tn\xe4me\n")
        self.assertIn("line 2: skipped: field uid", error)
        self.assertEqual(self.pw("list", "anything", "-f", self.passwd)[0], output)
        shown = self.pw("show", os.fsdecode(b"j\xf6"))[0]
        self.assertIn(b"\nFull name          : n\xe4me\n", shown)
        self.pw("show", "jim", code=16)

    def test_lines_without_a_password_never_show_one(self):
        self.write(b"jim:SECRET:0:1::/h\n")
        for words, code in ((("list",), 0), (("usermod", "jim"), 16), (("show", "jim"), 16)):
            output, error = self.pw(*words, code=code)
            self.assertNotIn("SECRET", error)
            self.assertNotIn(b"SECRET", output)


class Together(Pw):
    def run_at_once(self, *commands):
        """The exit codes of commands that run at the same time."""
        children = []
        for words in commands:
            child = os.fork()
            if child == 0:
                code = 99
                try:
                    with mock.patch("sys.stdin", Console(b"test\ntest\n")), mock.patch("sys.stdout", Console()), \
                            mock.patch("sys.stderr", Console()):
                        code = pureftpd.tool_pw(list(words))
                finally:
                    os._exit(code)
            children.append(child)
        return [os.WEXITSTATUS(os.waitpid(child, 0)[1]) for child in children]

    def test_twenty_at_once_lose_nothing(self):
        codes = self.run_at_once(*[("useradd", f"user{i}", "-u", "1", "-g", "1", "-d", "/h", "-m") for i in range(20)])
        self.assertEqual(codes, [0] * 20)
        self.assertEqual(len(self.read().splitlines()), 20)
        for i in range(20):
            self.assertIsNotNone(pureftpd.puredb_find(self.database, b"user%d" % i))
        codes = self.run_at_once(*[("userdel", f"user{i}") for i in range(10)],
                                 *[("usermod", f"user{i}", "-t", "7") for i in range(10, 20)])
        self.assertEqual(codes, [0] * 20)
        self.assertEqual(self.read().count(b":7168:"), 10)
        self.assertEqual(len(self.read().splitlines()), 10)
        self.assertEqual(sorted(os.listdir(self.directory)), ["pureftpd.passwd", "pureftpd.pdb"])

    def test_one_of_twenty_may_add_the_same_user(self):
        codes = self.run_at_once(*[("useradd", "joe", "-u", "1", "-g", "1", "-d", "/h")] * 20)
        self.assertEqual(sorted(codes), [0] + [4] * 19)
        self.assertEqual(len(self.read().splitlines()), 1)

    def test_the_tmp_of_the_original_is_in_the_way(self):
        with open(self.passwd + ".tmp", "wb") as file:
            os.fchmod(file.fileno(), 0o600)
        _, error = self.add("joe", code=4)
        self.assertIn(self.passwd + ".tmp", error)

    def test_on_a_terminal_the_password_is_not_shown(self):
        child, terminal = pty.fork()
        if child == 0:
            code = 99
            try:
                code = pureftpd.tool_pw(["useradd", "joe", "-u", "1", "-g", "1", "-d", "/h"])
            finally:
                os._exit(code)
        signal.alarm(20)
        self.addCleanup(signal.alarm, 0)
        self.addCleanup(os.close, terminal)
        shown = b""
        for prompt in (b"Password: ", b"again: "):
            while prompt not in shown:
                shown += os.read(terminal, 1000)
            os.write(terminal, b"test\n")
        with contextlib.suppress(OSError):                  # EIO: the other end is closed
            while True:
                shown += os.read(terminal, 1000) or b"\0"
        self.assertEqual(os.waitpid(child, 0)[1], 0, shown)
        self.assertNotIn(b"test", shown)
        self.assertIn(PW_HASH.encode(), self.read())


@unittest.skipUnless(PW_PURE_PW, "needs the original's pure-pw")
class Interchange(Pw):
    def test_the_same_lines_from_the_same_options(self):
        theirs = os.path.join(self.directory, "theirs")
        options = (("-D", "/h", "-c", "A b", "-t", "0", "-z", "2300-0005"),
                   ("-d", "/home/joe/", "-t", "5", "-T", "6", "-n", "0", "-N", "3", "-q", "1", "-Q", "10", "-y", "4",
                    "-z", "0900-1800", "-r", "10.0.0.0/8,a.example", "-R", "x", "-i", "y", "-I", "z"))
        for number, words in enumerate(options):
            words = ("useradd", f"u{number}", "-u", "1000", "-g", "1001", *words)
            self.pw(*words)
            self.assertEqual(self.original(*words, "-f", theirs, "-C", "100000", "-M", "8192")[0], 0)
        ours = [self.line(f"u{number}") for number in range(len(options))]
        self.passwd = theirs
        self.assertEqual([self.line(f"u{number}") for number in range(len(options))], ours)

    def test_usermod_userdel_list_show_and_mkdb_agree(self):
        text = b"".join(b"u%d:*:1000:1001:User %d:/home/u%d/./::::::::::::\n" % (i, i, i) for i in range(5))
        text += b"short:*:1:1::/h\nfull:*:1:1:g:/h:1024:2048:1:10:3:0:1048576:a:b:c:d:900-1800\n"
        text += b"half:*:1:1:g:/h::::::::x::\n"
        steps = (("usermod", "u1", "-t", "5", "-z", "0900-1000", "-c", "x"),
                 ("usermod", "full", "-t", "", "-r", "", "-z", ""), ("userdel", "u2"),
                 ("usermod", "u3", "-D", "/new/", "-y", "7", "-n", "0", "-N", "2"),
                 ("usermod", "short", "-y", "0"),
                 ("list",), ("show", "u1"), ("show", "full"), ("show", "short"), ("show", "half"), ("mkdb",),
                 ("show", "nobody"), ("userdel", "nobody"), ("usermod", "nobody"), ("useradd",), ("show",),
                 ("userdel",), ("passwd",))
        results = []
        for run in (self.original, None):
            self.write(text)
            answers = []
            for words in steps:
                if run:
                    place = ("x",) if words == ("list",) else (self.database,) if words == ("mkdb",) else ()
                    answers.append(run(*words, *place))
                else:
                    code = results[0][0][len(answers)][0]
                    answers.append((code, self.pw(*words, code=code)[0]))
            results.append((answers, self.read(), self.read(self.database)))
        for theirs, ours in zip(*results):
            self.assertEqual(ours, theirs)

    def test_each_reads_what_the_other_wrote(self):
        self.assertEqual(self.original("useradd", "joe", "-u", "1000", "-g", "1001", "-d", "/h", "-m", "-F",
                                       self.database, "-f", self.passwd,
                                       "-C", "100000", "-M", "8192", typed=b"s\xe9cret\ns\xe9cret\n")[0], 0)
        value = pureftpd.puredb_find(self.database, b"joe")
        entry = pureftpd.passwd_entry(b"joe:" + value)
        try:
            self.assertTrue(pureftpd.password_verify(b"s\xe9cret", entry.hash))
            self.assertFalse(pureftpd.password_verify(b"secret", entry.hash))
        except pureftpd.HashUnsupported:
            pass                                            # a world without Argon2
        self.pw("usermod", "joe", "-t", "9")
        code, shown = self.original("show", "joe", "-f", self.passwd)
        self.assertEqual(code, 0)
        self.assertEqual(self.pw("show", "joe")[0], shown)


@unittest.skipUnless(PURE_FTPD and os.geteuid() == 0, "needs root and the original's pure-ftpd")
class OriginalServer(Pw):
    def login(self, password):
        """The original's reply to PASS, run as inetd would with our database."""
        with socket.socket() as listener:
            listener.bind(("127.0.0.1", 0))
            listener.listen(1)
            client = socket.create_connection(listener.getsockname(), timeout=20)
            server, _ = listener.accept()
        self.addCleanup(client.close)
        with server:
            process = subprocess.Popen([PURE_FTPD, "-l", "puredb:" + self.database, "-H", "-E", "-f", "none"],
                                       stdin=server, stdout=server, stderr=subprocess.DEVNULL)
        self.addCleanup(process.wait)
        self.addCleanup(process.kill)
        replies = client.makefile("rb")
        self.addCleanup(replies.close)
        for command in (b"", b"USER joe\r\n", b"PASS " + password + b"\r\n"):
            client.sendall(command)
            reply = b"-" * 4
            while reply and reply[3:4] == b"-":
                reply = replies.readline()
        return reply[:3]

    def test_it_accepts_every_kind_of_hash_that_we_make(self):
        os.chmod(self.directory, 0o755)
        makers = {"argon2id": lambda *_: pureftpd.argon2_make(b"s\xe9cret", 2, 1 << 20),
                  "scrypt": lambda *_: pureftpd.scrypt_make(b"s\xe9cret", 3, 1 << 20),
                  "SHA-512": lambda *_: pureftpd.crypt_in_python(b"s\xe9cret", b"$6$rounds=1234$saltstring$").decode(),
                  "SHA-256": lambda *_: pureftpd.crypt_in_python(b"s\xe9cret", b"$5$saltstring$").decode(),
                  "MD5": lambda *_: pureftpd.crypt_in_python(b"s\xe9cret", b"$1$salt$").decode()}
        for name, maker in makers.items():
            with self.subTest(name), mock.patch.object(pureftpd, "best_crypt", maker):
                try:
                    self.pw("useradd", "joe", "-u", "65534", "-g", "65534", "-D", self.directory, "-m")
                except pureftpd.HashUnsupported as reason:
                    self.skipTest(str(reason))
                self.assertEqual(self.login(b"s\xe9cret"), b"230")
                os.unlink(self.passwd)


class Converting(unittest.TestCase):
    USER = types.SimpleNamespace(pw_name="joe", pw_passwd="x", pw_uid=1000, pw_gid=1001, pw_gecos="Joe Doe,Room 1",
                                 pw_dir="/", pw_shell="/bin/sh")

    def line(self, hashed="$6$a$b", **changes):
        return pureftpd.pwconvert_line(types.SimpleNamespace(**{**vars(self.USER), **changes}), hashed,
                                       {"/bin/sh", "ftp"})

    def test_lines(self):
        self.assertEqual(self.line(), "joe:$6$a$b:1000:1001:Joe Doe://./")
        self.assertEqual(self.line(pw_shell="FTP"), "joe:$6$a$b:1000:1001:Joe Doe://./")
        for hashed in ("*", "!", "", "x", "!$6$a$b"):
            self.assertEqual(self.line(hashed), "joe:*:1000:1001:Joe Doe://./")
        for changes in ({"pw_uid": 0}, {"pw_gid": 0}, {"pw_dir": "/nonexistent"}, {"pw_shell": "/bin/false"},
                        {"pw_name": "a:b"}, {"pw_gecos": "Joe,a:b"}, {"pw_shell": ""}):
            with self.subTest(changes):
                self.assertIsNone(self.line(**changes))

    def convert(self):
        output = Console()
        with mock.patch("sys.stdout", output):
            self.assertEqual(pureftpd.tool_pwconvert([]), 0)
        return output.bytes()

    def test_shells_and_shadow_that_cannot_be_read(self):
        self.assertEqual(pureftpd.pwconvert_shells("/nonexistent"), {"/bin/sh", "/bin/csh", "ftp"})
        self.assertEqual(pureftpd.pwconvert_shadow("/nonexistent"), {})

    @unittest.skipUnless(PW_PURE_PW, "needs the original's pure-pwconvert")
    def test_the_same_as_the_original(self):
        theirs = subprocess.run([PW_PURE_PW + "convert"], stdout=subprocess.PIPE, check=True)
        self.assertEqual(self.convert(), theirs.stdout)


# ==== Tests: quotacheck ===========================================================================


SOMEBODY = 23456                # an id that no account has
needs_root = unittest.skipUnless(os.geteuid() == 0, "needs root")


def in_child(function, *args, terminal=None):
    """(exit code, what it printed) of function(*args), an exit code, in a process of its own."""
    with tempfile.TemporaryFile() as output:
        child = os.fork()
        if child == 0:
            code = 99
            try:
                os.dup2(output.fileno(), 1)
                os.dup2(output.fileno() if terminal is None else terminal, 2)
                sys.stdout, sys.stderr = (open(fd, "w", buffering=1, closefd=False) for fd in (1, 2))
                code = function(*args)
            except BaseException:
                import traceback
                traceback.print_exc()
            finally:
                sys.stdout.flush()
                os._exit(code)
        _, status = os.waitpid(child, 0)
        output.seek(0)
        return os.WEXITSTATUS(status), output.read().decode()


class QuotacheckTests(unittest.TestCase):
    """A tree of somebody's in `home`, and `outside`, which is not his."""

    def setUp(self):
        self.top = tempfile.mkdtemp()
        self.addCleanup(subprocess.run, ["rm", "-rf", self.top], check=True)
        os.chmod(self.top, 0o755)
        self.uid = SOMEBODY if os.geteuid() == 0 else os.geteuid()
        self.home, self.outside = os.path.join(self.top, "home"), os.path.join(self.top, "outside")
        for path in (self.home, self.outside):
            os.mkdir(path)
        self.file("../outside/secret", 1000)
        os.mkdir(self.path("../outside/closed"), 0o700)
        self.own(self.home)

    def path(self, name):
        return os.path.join(self.home, name)

    def own(self, path):
        if os.geteuid() == 0:
            os.chown(path, SOMEBODY, SOMEBODY, follow_symlinks=False)

    def file(self, name, size):
        with open(self.path(name), "wb") as file:
            file.write(b"x" * size)
        self.own(self.path(name))

    def directory(self, name, mode=0o755):
        os.makedirs(self.path(name))
        os.chmod(self.path(name), mode)
        self.own(self.path(name))

    def directory_with(self, name, size, mode):
        self.directory(name)
        self.file(name + "/f", size)
        os.chmod(self.path(name), mode)

    def link(self, name, target):
        os.symlink(target, self.path(name))
        self.own(self.path(name))

    def job(self):
        return pureftpd.QuotacheckJob(os.fsencode(self.home), self.uid, SOMEBODY, (SOMEBODY,))

    def run_job(self, walk=None):
        """Count `home` as its owner, with another class for QuotaWalk if need be, in another process: its exit code."""
        def run():
            if walk:
                pureftpd.QuotaWalk = walk
            return pureftpd.quotacheck_child(self.job(), lambda files: None)
        return in_child(run)[0]

    def counted(self, walk=None):
        self.assertEqual(self.run_job(walk), 0)
        with open(self.path(".ftpquota")) as file:
            return file.read()


class Quotacheck(QuotacheckTests):
    def test_what_is_counted(self):
        """The numbers of the original, 1.0.50, but for the closed directory, which 1.0.54 opens."""
        self.directory("d")
        self.file("f", 6)
        for name, make, expected in (
                ("nothing more", lambda: None, "2 6\n"),
                ("link to a file", lambda: self.link("l1", "f"), "3 12\n"),
                ("absolute link", lambda: self.link("l2", "/f"), "4 18\n"),
                ("link over the top", lambda: self.link("l3", "../../../../f"), "5 24\n"),
                ("link to outside", lambda: self.link("l4", "../outside/secret"), "5 24\n"),
                ("absolute link to outside", lambda: self.link("l5", self.outside), "5 24\n"),
                ("link to nothing", lambda: self.link("l6", "nothing"), "5 24\n"),
                ("link to itself", lambda: self.link("l7", "l7"), "5 24\n"),
                ("link to a directory", lambda: self.link("l8", "d"), "5 24\n"),
                ("link to the top", lambda: self.link("d/l9", "/"), "5 24\n"),
                ("hard link", lambda: os.link(self.path("f"), self.path("hard")), "6 30\n"),
                ("fifo", lambda: os.mkfifo(self.path("fifo")), "6 30\n"),
                (".ftpquota below", lambda: self.file("d/.ftpquota", 3), "6 30\n"),
                ("link to it", lambda: self.link("lq", "d/.ftpquota"), "7 33\n"),
                ("closed directory", lambda: self.directory_with("c", 4, 0), "9 37\n"),
                ("unsearchable one", lambda: self.directory_with("s", 1, 0o600), "11 38\n"),
        ):
            with self.subTest(name):
                make()
                self.assertEqual(self.counted(), expected)
        self.assertEqual(stat.S_IMODE(os.stat(self.path("c")).st_mode), 0o500)
        os.chmod(self.path("c"), 0o700)
        self.assertEqual(stat.S_IMODE(os.stat(self.path("s")).st_mode), 0o700)

    @needs_root
    def test_directories_of_others_are_passed_by(self):
        self.directory("c")
        self.file("c/f", 4)
        os.chown(self.path("c"), 0, 0)
        os.chmod(self.path("c"), 0o700)
        self.assertEqual(self.counted(), "0 0\n")
        self.assertEqual(stat.S_IMODE(os.stat(self.path("c")).st_mode), 0o700)

    def test_the_file(self):
        self.counted()
        self.assertEqual(stat.S_IMODE(os.stat(self.path(".ftpquota")).st_mode), 0o600)
        with open(self.path(".ftpquota"), "w") as file:
            file.write("123456 99999999 and more\n")
        os.chmod(self.path(".ftpquota"), 0o644)
        self.assertEqual(self.counted(), "0 0\n")
        self.assertEqual(stat.S_IMODE(os.stat(self.path(".ftpquota")).st_mode), 0o644)
        os.unlink(self.path(".ftpquota"))
        for make in (lambda: self.link(".ftpquota", "../outside/secret"), lambda: os.mkfifo(self.path(".ftpquota")),
                     lambda: os.mkdir(self.path(".ftpquota"))):
            make()
            self.own(self.path(".ftpquota"))
            self.assertEqual(self.run_job(), 251)
            (os.rmdir if os.path.isdir(self.path(".ftpquota")) else os.unlink)(self.path(".ftpquota"))
        self.assertEqual(os.stat(self.path("../outside/secret")).st_size, 1000)

    def test_a_top_that_its_owner_closed_is_opened_for_him(self):
        os.chmod(self.home, 0o500)
        self.assertEqual(self.counted(), "0 0\n")
        self.assertEqual(stat.S_IMODE(os.stat(self.home).st_mode), 0o700)

    def test_a_very_deep_tree(self):
        here, depth = os.getcwd(), 1200
        os.chdir(self.home)
        try:
            for _ in range(depth):
                os.mkdir("directory")
                self.own("directory")
                os.chdir("directory")
        finally:
            os.chdir(here)
        self.assertEqual(self.counted(), "%d 0\n" % depth)

    def test_without_descriptors_nothing_is_written(self):
        def run():
            resource.setrlimit(resource.RLIMIT_NOFILE, (30, 30))
            pureftpd.quotacheck_descriptors = lambda: None
            return pureftpd.quotacheck_child(self.job(), lambda files: None)
        self.directory("/".join("d" * 40))
        for root, directories, _ in os.walk(self.home):
            for name in directories:
                self.own(os.path.join(root, name))
        self.assertEqual(in_child(run)[0], 252)
        self.assertFalse(os.path.exists(self.path(".ftpquota")))

    def test_the_counting_process_is_the_user_for_good(self):
        seen = self.path("seen")

        class Telling(pureftpd.QuotaWalk):
            def count(self):
                ids = "%r %r %r %r" % (os.getresuid(), os.getresgid(), os.getgroups(), os.listdir("/"))
                fd = os.open("seen", os.O_CREAT | os.O_WRONLY, dir_fd=self.tree.root)
                os.write(fd, ids.encode())
                os.close(fd)
        if os.geteuid() == 0:
            self.counted(Telling)
            with open(seen) as file:
                self.assertEqual(file.read(), "%r %r %r []" % ((SOMEBODY,) * 3, (SOMEBODY,) * 3, [SOMEBODY]))


class QuotacheckRaces(QuotacheckTests):
    """What its owner does to the tree while it is walked."""

    def swapping(self, method, victim, swap):
        """QuotaWalk, with `swap` called just before `method` looks at `victim`."""
        original = getattr(pureftpd.QuotaWalk, method)

        def swapped(walk, *args):
            if args[-1] == victim:
                swap()
            return original(walk, *args)
        return type("Swapping", (pureftpd.QuotaWalk,), {method: swapped})

    def become_link(self, name, target):
        """Inside the chroot the tree is at /, outside of it at home."""
        def swap():
            base = "/" if os.geteuid() == self.uid and self.uid == SOMEBODY else self.home
            os.rename(os.path.join(base, name), os.path.join(base, "moved"))
            os.symlink(target, os.path.join(base, name))
        return swap

    def test_a_directory_becomes_a_link_before_it_is_opened(self):
        self.directory("victim")
        self.file("victim/f", 10)
        for target in ("../outside", self.outside, "/"):
            with self.subTest(target):
                walk = self.swapping("descend", b"victim", self.become_link("victim", target))
                self.assertEqual(self.counted(walk), "0 0\n")
                os.unlink(self.path("victim"))
                os.rename(self.path("moved"), self.path("victim"))

    def test_a_closed_directory_becomes_a_link_before_it_is_unlocked(self):
        self.directory("victim", 0)
        self.directory("open", 0o700)
        os.chmod(self.path("../outside/closed"), 0)
        self.own(self.path("../outside/closed"))
        for target in ("../outside/closed", self.outside + "/closed"):
            with self.subTest(target):
                walk = self.swapping("unlock", b"victim", self.become_link("victim", target))
                self.assertEqual(self.counted(walk), "1 0\n")
                self.assertEqual(stat.S_IMODE(os.stat(self.path("../outside/closed")).st_mode), 0)
                os.unlink(self.path("victim"))
                os.chmod(self.path("moved"), 0)
                os.rename(self.path("moved"), self.path("victim"))

    def test_a_directory_that_is_moved_out_is_no_way_out(self):
        """Even where the kernel would take its `..` to the world outside of the chroot."""
        self.directory("a/b")
        self.own(self.path("a"))
        self.link("a/b/up", "../../outside/secret")
        self.link("a/b/up2", "../secret")
        reading, writing = os.pipe()
        moved, go_on = os.pipe()

        def swap():
            os.write(writing, b"x")
            os.read(moved, 1)
        child = os.fork()
        if child == 0:
            os.read(reading, 1)
            os.rename(self.path("a/b"), os.path.join(self.outside, "b"))
            os.write(go_on, b"x")
            os._exit(0)
        try:
            self.assertEqual(self.counted(self.swapping("follow", b"up2", swap)), "2 0\n")
        finally:
            os.write(writing, b"x")
            os.waitpid(child, 0)
            for fd in (reading, writing, moved, go_on):
                os.close(fd)

    def test_a_file_that_vanishes(self):
        self.file("f", 10)
        self.link("l", "f")
        self.assertEqual(self.counted(self.swapping("follow", b"l", lambda: os.unlink(
            "/f" if self.uid == SOMEBODY else self.path("f")))), "1 10\n")

    def test_a_busy_swapper(self):
        """As fast as it can be done, from outside: nothing of `outside` is ever counted."""
        self.directory("victim")
        self.directory("x/y")
        self.own(self.path("x"))
        child = os.fork()
        if child == 0:
            os.chdir(self.home)
            while True:
                os.rename("victim", "hidden")
                os.symlink(self.outside, "victim")
                os.unlink("victim")
                os.rename("hidden", "victim")
        try:
            deadline = time.monotonic() + 0.5
            while time.monotonic() < deadline:
                files, size = map(int, self.counted().split())
                self.assertIn((files, size), ((2, 0), (3, 0), (4, 0)))
        finally:
            os.kill(child, 9)
            os.waitpid(child, 0)


class QuotacheckTool(QuotacheckTests):
    def tool(self, *argv):
        return in_child(pureftpd.tool_quotacheck, list(argv))

    @needs_root
    def test_exit_codes_of_root(self):
        home, whom = ("-d", self.home), ("-u", pureftpd_account())
        os.chmod(self.path("../outside/closed"), 0o700)
        for code, argv in (
                (0, ()), (0, ("-h",)), (0, ("-Z",)),
                (255, whom), (255, (*whom, "-d", "/a", "-d", "/b")), (255, (*whom, "-g", "1", "-g", "2", *home)),
                (255, (*whom, *home, "more")), (255, ("-a", "/nothing")), (255, ("-a", "/nothing", *home)),
                (255, ("-a", "/nothing", *whom)),
                (254, home), (254, ("-u", "root", "-g", "1", *home)), (254, ("-u", "no-such-user", "-g", "1", *home)),
                (254, (*whom, "-g", "0", *home)), (254, (*whom, "-g", "no-such", *home)),
                (253, ("-u", str(SOMEBODY), "-g", "1", *home)), (253, (*whom, "-d", "/nothing")),
                (253, (*whom, "-d", self.outside + "/secret")), (253, (*whom, "-d", self.outside + "/closed")),
                (251, (*whom, *home))):
            with self.subTest(argv):
                result, output = self.tool(*argv)
                self.assertEqual(result, code, output)
                self.assertEqual(output.count("pure-quotacheck: "), 1 if code else output.count("unknown option"))

    @needs_root
    def test_an_account(self):
        nobody = pureftpd_account()
        uid = pureftpd_ids(nobody)[0]
        self.file("f", 5)
        os.chown(self.home, uid, 0)
        for argv in (("-u", nobody), ("-u", nobody, "-g", "1"), ("-g", "1", "-u", str(uid))):
            with self.subTest(argv):
                self.assertEqual(self.tool(*argv, "-d", self.home), (0, ""))
                st = os.stat(self.path(".ftpquota"))
                self.assertEqual((st.st_uid, st.st_gid), (uid, 1 if "-g" in argv else pureftpd_ids(nobody)[1]))
                with open(self.path(".ftpquota")) as file:
                    self.assertEqual(file.read(), "1 5\n")
                os.unlink(self.path(".ftpquota"))

    def test_an_ordinary_user_counts_his_own_tree_only(self):
        def tool(*argv):
            if os.geteuid() == 0:
                os.setgroups([])
                os.setgid(SOMEBODY)
                os.setuid(SOMEBODY)
            return pureftpd.tool_quotacheck(list(argv))
        self.file("f", 5)
        self.link("abs", self.home + "/f")
        self.link("out", self.outside + "/secret")
        code, output = in_child(tool, "-d", self.home)
        self.assertEqual((code, "without chroot" in output), (0, True), output)
        with open(self.path(".ftpquota")) as file:
            self.assertEqual(file.read(), "2 10\n")
        self.assertEqual(in_child(tool, "-d", self.home, "-u", str(self.uid + 1))[0], 253)
        self.assertEqual(in_child(tool, "-a", "/x")[0], 253)
        if os.geteuid() == 0:
            os.mkdir(self.path("../others"))
            self.assertEqual(in_child(tool, "-d", self.path("../others"))[0], 253)

    def database(self, *lines):
        path = os.path.join(self.top, "pdb")
        with open(path, "wb") as file:
            file.write(pureftpd.puredb_build([tuple(line.encode().split(b":", 1)) for line in lines]))
        return path

    @needs_root
    def test_every_user_of_a_database(self):
        names = ["one", "two", "three"]
        for number, name in enumerate(names, 1):
            self.directory(name, 0o700)
            self.file(name + "/f", number)
            os.chown(self.path(name), SOMEBODY + number, SOMEBODY)
        lines = ["%s:*:%d:%d::%s/%s:" % (name, SOMEBODY + number, SOMEBODY, self.home, name + "/./" * (number == 2))
                 for number, name in enumerate(names, 1)]
        path = self.database(*lines, "one:*:1:1::/:")
        self.assertEqual(pureftpd.quotacheck_users(path), [tuple(line.encode().split(b":", 1)) for line in lines])
        self.assertEqual(self.tool("--all", path), (0, ""))
        for number, name in enumerate(names, 1):
            with open(self.path(name + "/.ftpquota")) as file:
                self.assertEqual(file.read(), "1 %d\n" % number)
            self.assertEqual(os.stat(self.path(name + "/.ftpquota")).st_uid, SOMEBODY + number)
        shutil.rmtree(self.path("one"))
        os.unlink(self.path("three/.ftpquota"))
        path = self.database(*lines, "root:*:0:0::/:")
        code, output = self.tool("--all", path)
        self.assertEqual((code, output.count("\n")), (253, 2), output)
        self.assertTrue(os.path.exists(self.path("three/.ftpquota")))

    @needs_root
    def test_progress_on_a_terminal(self):
        terminal, end = pty.openpty()
        self.addCleanup(os.close, terminal)
        path = self.database("one:*:%d:%d::%s:" % (SOMEBODY, SOMEBODY, self.home))
        self.assertEqual(in_child(pureftpd.tool_quotacheck, ["--all", path], terminal=end)[0], 0)
        os.close(end)
        self.assertIn(b"1/1 one: 0 files", os.read(terminal, 4096))


def pureftpd_account():
    """The name of an account that is not root's."""
    return next(p.pw_name for p in pwd.getpwall() if p.pw_uid > 1 and p.pw_gid > 1)


def pureftpd_ids(name):
    account = pwd.getpwnam(name)
    return account.pw_uid, account.pw_gid


class Statsdecode(unittest.TestCase):
    """Lines as the original's tool makes them."""

    def setUp(self):
        self.addCleanup(self.zone, os.environ.get("TZ", "UTC"))
        self.zone("CET-1")

    @staticmethod
    def zone(name):
        os.environ["TZ"] = name
        time.tzset()

    LINES = (
        (b"1795438771 6b0438af.1 joe h U 5 2 /a b\n", b"2026/11/23 13:59:31 6b0438af.1 joe h U 5 2 /a b\n"),
        (b"0 x\x1b[2J\x7f\t\xc3\xa9y\n", b"1970/01/01 01:00:00 x[2J\xc3\xa9y\n"),
        (b"999999999999999999999999999999999999999999999 x\n", b"- - x\n"),
        (b"\n", b"1970/01/01 01:00:00 "),
        (b"12\n", b"1970/01/01 01:00:12 "),
        (b"word word\n", b"1970/01/01 01:00:00 ord word\n"),
        (b"12", b""),
        (b"12 no newline", b"1970/01/01 01:00:12 no newline"),
    )

    def test_lines(self):
        for line, decoded in self.LINES:
            with self.subTest(line):
                self.assertEqual(pureftpd.statsdecode_line(line), decoded)

    def test_tool(self):
        with tempfile.NamedTemporaryFile() as file:
            file.write(b"12 a\n13 b\n")
            file.flush()
            self.assertEqual(in_child(pureftpd.tool_statsdecode, [file.name]),
                             (0, "1970/01/01 01:00:12 a\n1970/01/01 01:00:13 b\n"))
        self.assertEqual(in_child(pureftpd.tool_statsdecode, ["/nothing/there"])[0], 255)
        self.assertEqual(in_child(pureftpd.tool_statsdecode, [])[0], 1)
        self.assertEqual(in_child(pureftpd.tool_statsdecode, ["a", "b"])[0], 1)


# ==== Tests: ftpwho ===============================================================================


FTPWHO_ORIGINAL = os.environ.get("PUREFTPD_ORIGINAL", "/opt/pureftpd-orig/usr/sbin")
HOSTILE = "\x1b[31m\"'><script>|\\&amp;\N{RIGHT-TO-LEFT OVERRIDE}\n".encode() + b"\xff"


def can_run_original():
    """Whether the original's tools can run beside us, with a /run of their own."""
    return os.geteuid() == 0 and os.path.exists(FTPWHO_ORIGINAL + "/pure-ftpwho") and subprocess.run(
        ["unshare", "-m", "mount", "-t", "tmpfs", "none", "/run"], stderr=subprocess.DEVNULL).returncode == 0


class FtpwhoTest(unittest.TestCase):
    def setUp(self):
        self.statedir = tempfile.mkdtemp()
        self.addCleanup(shutil.rmtree, self.statedir)

    def claim(self, pid, account, *state, age=10, peer=("192.0.2.7", 4242, "198.51.100.1", 21), now=None):
        entry = pureftpd.scoreboard_claim(self.statedir, pid, Peer(*peer), time.time() - age)
        self.addCleanup(entry.close)
        entry.login(account)
        if state:
            entry.update(*state, now=now)

    def run_tool(self, *argv):
        """(exit code, output, errors) of ftpwho."""
        out, err = io.TextIOWrapper(io.BytesIO(), "utf-8"), io.StringIO()
        with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
            code = pureftpd.tool_ftpwho([*argv, "--statedir", self.statedir])
            out.flush()
        return code, out.buffer.getvalue().decode("utf-8", "surrogateescape"), err.getvalue()

    def output(self, *argv):
        code, out, err = self.run_tool(*argv)
        self.assertEqual((code, err), (0, ""))
        return out


class FtpwhoSessions(unittest.TestCase):
    """From record to what is shown: (state, restart, total, current, started) -> (percent, rate, KB shown, total)."""

    def test_numbers(self):
        idle, down, up = pureftpd.SCOREBOARD_IDLE, pureftpd.SCOREBOARD_DOWNLOAD, pureftpd.SCOREBOARD_UPLOAD
        for given, wanted in (
                ((down, 0, 1000, 500, 990), (50, 50, 500, 1000)),
                ((down, 100, 1000, 500, 990), (50, 40, 500, 1000)),
                ((down, 0, 1000, 994, 990), (99, 99, 994, 1000)),
                ((down, 0, 1000, 995, 990), (100, 99, 995, 1000)),
                ((down, 0, 1000, 5000, 990), (100, 500, 5000, 1000)),
                ((down, 900, 1000, 500, 990), (50, 50, 500, 1000)),     # a restart beyond is none
                ((up, 0, 1000, 500, 990), (0, 50, 500, 0)),
                ((up, 0, 0, 500, 1000), (0, 0, 500, 0)),                # began this second
                ((up, 0, 0, 500, 2000), (0, 0, 500, 0)),                # ... or in the future
                ((idle, 0, 1000, 500, 990), (0, 0, 0, 0)),
                ((9, 0, 1000, 500, 990), (0, 0, 0, 0))):
            state, restart, total, current, started = given
            record = pureftpd.ScoreboardRecord(1, state, ("a", 1), ("b", 2), 900, started, restart, total, current,
                                               b"u", b"f")
            with self.subTest(given):
                session = pureftpd.ftpwho_session(record, 1000.9, str)
                self.assertEqual((session.percent, session.rate, session.current, session.total), wanted)
                self.assertEqual(session.age, 100)

    def test_short_rates_and_sizes(self):
        for rate, wanted in ((0, "   ''  "), (5, "   5b/s"), (1023, "1023b/s"), (1024, "   1K/s"), (1 << 20, "   1M/s"),
                             (5 << 30, "   5G/s"), (1 << 40, "   ''  ")):
            self.assertEqual(pureftpd.ftpwho_short_rate(rate), wanted)
        for size, wanted in ((0, "0 B"), (999, "999 B"), (1000, "1.0 KiB"), (102400, "100 KiB"), (5 << 30, "5.0 GiB"),
                             (3 << 50, "3072 TiB")):
            self.assertEqual(pureftpd.ftpwho_size(size), wanted)

    def test_host_names_are_looked_up_once_and_not_for_ever(self):
        with mock.patch("pureftpd.socket.getnameinfo", side_effect=[("a.example", "0"), OSError]) as look_up:
            hosts = pureftpd.FtpwhoHosts(False)
            self.assertEqual([hosts(a) for a in ("192.0.2.1", "192.0.2.1", "192.0.2.2")],
                             ["a.example", "a.example", "192.0.2.2"])
            hosts.deadline = time.monotonic() - 1
            self.assertEqual((hosts("192.0.2.3"), look_up.call_count), ("192.0.2.3", 2))
            self.assertEqual(pureftpd.FtpwhoHosts(True)("192.0.2.1"), "192.0.2.1")


class Ftpwho(FtpwhoTest):
    def test_nobody(self):
        self.assertEqual(self.output("-s"), "")
        self.assertEqual(self.output("-x"), '<?xml version="1.0" encoding="UTF-8"?>\n<status>\n</status>\n')
        self.assertEqual(json.loads(self.output("--json")), {"sessions": []})
        self.assertIn("Nobody is logged in.", self.output("-w"))
        self.assertIn('pureftpd_sessions{state="idle"} 0\n', self.output("--prometheus"))
        self.assertEqual(len(self.output().splitlines()), 5)

    def test_a_download_in_every_form(self):
        self.claim(os.getpid(), b"joe", pureftpd.SCOREBOARD_DOWNLOAD, b"/a b", 4 << 20, 0, 1 << 20, age=7200,
                   now=time.time() - 1000)
        pid = os.getpid()
        self.assertRegex(self.output("-s", "-n"),
                         r"^%d\|joe\|720[01]\| DL \|/a b\|192.0.2.7\|198.51.100.1\|21\|1024\|4096\|25\|1\n$" % pid)
        self.assertIn("|%5d | joe     | 02:00 |  DL  | %-42s|\n|  ''  |    ''   |   1K/s|  25%% | ->%39s |\n"
                      % (pid, "/a b", "192.0.2.7"), self.output("-H"))
        self.assertIn("| Total size:     4096 Transferred:     1024 |\n"
                      "|  ''  |    ''   |       |      | <-%33s:21    |\n" % "198.51.100.1", self.output("-Hv"))
        (client,) = ElementTree.fromstring(self.output("-nx"))
        self.assertEqual((client.get("file"), client.get("percentage"), client.get("state")), ("/a b", "25", " DL "))
        (entry,) = plistlib.loads(self.output("-np").encode())["user-info"]
        self.assertEqual((entry["account"], entry["total_size"]), ("joe", str(4 << 20)))
        (session,) = json.loads(self.output("--json"))["sessions"]
        self.assertEqual((session["state"], session["percent"], session["bytes"]), ("download", 25, 1 << 20))
        metrics = self.output("--prometheus")
        self.assertIn('pureftpd_account_sessions{account="joe"} 1\n', metrics)
        self.assertIn('pureftpd_transfer_bytes{direction="download"} 1048576\n', metrics)
        self.assertIn('<progress max="100" value="25"', self.output("-nw"))

    def test_a_hostile_name_stays_a_name_in_every_form(self):
        self.claim(os.getpid(), b"a" + HOSTILE[:30], pureftpd.SCOREBOARD_UPLOAD, b"f" + HOSTILE, 0, 0, 5)
        for form in ("-v", "-w", "-x", "-p", "--json", "--prometheus", "-s", "-H"):
            with self.subTest(form):
                out = self.output("-n", form)
                self.assertNotRegex(out, "[\x00-\x08\x0b-\x1f\x7f]")
                self.assertTrue("\N{RIGHT-TO-LEFT OVERRIDE}" not in out or form == "-s")
        self.assertEqual(len(self.output("-ns").splitlines()), 1)
        self.assertEqual(len(re.split(r"(?<!\\)(?:\\\\)*\|", self.output("-ns"))), 12)
        self.assertEqual(len(ElementTree.fromstring(self.output("-nx"))), 1)
        self.assertEqual(len(plistlib.loads(self.output("-np").encode())["user-info"]), 1)
        self.assertIn("<script>", json.loads(self.output("--json"))["sessions"][0]["file"])
        self.assertNotIn("<script", self.output("-nw"))
        for line in self.output("--prometheus").splitlines():
            self.assertRegex(line, r'^(# (HELP|TYPE) .*|pureftpd_\w+\{\w+="([^"\\]|\\\\|\\")*"\} \d+)$')

    def test_the_page_is_well_formed_and_needs_nothing_else(self):
        for number, state in enumerate((pureftpd.SCOREBOARD_IDLE, pureftpd.SCOREBOARD_UPLOAD, 7)):
            self.claim((os.getpid(), os.getppid(), 1)[number], b"user", state, b"x", 0, 0, 100 * number)
        page = self.output("-nw")
        self.assertTrue(page.startswith("<!DOCTYPE html>\n"))
        ElementTree.fromstring(re.sub(r"<meta [^>]*>", "", page.partition("\n")[2]))
        self.assertNotRegex(page, r"https?://|@import|url\(|src=")
        inside = self.output("-nW")
        self.assertIn(inside.partition("</time>")[0][-60:], page)
        self.assertTrue(inside.startswith("<div") and inside.endswith("</div>\n"))

    def test_cgi(self):
        head = "Content-Type: text/html; charset=utf-8\nCache-Control: no-store\n\n"
        self.assertTrue(self.output("-c").startswith(head + "<!DOCTYPE"))
        self.assertTrue(self.output("-c", "-W").startswith(head + "<div"))
        with mock.patch.dict(os.environ, {"GATEWAY_INTERFACE": "CGI/1.1"}):
            self.assertTrue(self.output().startswith(head + "<!DOCTYPE"))
            self.assertTrue(self.output("-x").startswith("<?xml"))

    def test_the_last_form_wins_and_sessions_are_sorted(self):
        self.assertTrue(self.output("-x", "-w", "-s", "-p").startswith("<?xml"))
        self.claim(os.getpid(), b"new", age=5)
        self.claim(os.getppid(), b"old", age=50)
        self.assertEqual([line.split("|")[1] for line in self.output("-ns").splitlines()], ["old", "new"])

    def test_mistakes(self):
        for argv, wanted in ((("-z",), "-z: unknown option"), (("x",), "x: ftpwho takes no arguments")):
            code, out, err = self.run_tool(*argv)
            self.assertEqual((code, out, err.count("\n")), (1, "", 1))
            self.assertIn("pure-ftpwho: " + wanted, err)
        self.statedir += "/none"
        self.addCleanup(setattr, self, "statedir", self.statedir)
        self.assertEqual(self.run_tool()[0], 255)
        code, out, _ = self.run_tool("-h")
        self.assertEqual((code, out.startswith("ftpwho [options]")), (0, True))

    @unittest.skipUnless(can_run_original(), "needs root, unshare and the original's programs")
    def test_the_original_says_the_same(self):
        """Our entries, in Debian's layout, as its ftpwho and ours show them: -s, the tables, and XML."""
        result = subprocess.run(
            ["unshare", "-m", "sh", "-c", 'mount -t tmpfs none /run && exec "$@"', "sh", sys.executable, "-c",
             FTPWHO_BESIDE_ORIGINAL, FTPWHO_ORIGINAL], stdout=subprocess.PIPE, cwd=os.path.dirname(pureftpd.__file__))
        theirs, ours = json.loads(result.stdout)
        self.assertEqual(len(theirs), 12)
        self.assertEqual(ours, theirs)


# Run with a /run of its own: makes entries for children, one at a time (the original's order is the directory's), and
# prints [what the original says of each, what we say].
FTPWHO_BESIDE_ORIGINAL = r"""
import contextlib, io, json, os, subprocess, sys, time
import pureftpd
S = "/run/pure-ftpd"
pureftpd.statedir_prepare(S)
now, pid = int(time.time()), os.getpid()
D, U, I = pureftpd.SCOREBOARD_DOWNLOAD, pureftpd.SCOREBOARD_UPLOAD, pureftpd.SCOREBOARD_IDLE
theirs, ours = [], []
def show_theirs(flags):
    out = subprocess.run([sys.argv[1] + "/pure-ftpwho", "-n", flags], stdout=subprocess.PIPE).stdout.decode()
    return out.replace("ISO-8859-15", "UTF-8")
def show_ours(flags):
    out = io.TextIOWrapper(io.BytesIO(), "utf-8")
    with contextlib.redirect_stdout(out):
        pureftpd.tool_ftpwho(["-n", flags])
    return out.buffer.getvalue().decode()
for peer, account, age, update in (
        (("127.0.0.1", 1, "127.0.0.1", 21), b"alice", 4000, (D, b"/pub/a|b\\c.iso", 5 << 30, 1000, 3 << 30, now - 40)),
        (("2001:db8::1:2", 2, "::1", 2121), b"long.account@example.org", 70,
         (U, b"/u/<&>" + b"x" * 99, 0, 0, 7 << 20, now - 9)),
        (("192.0.2.7", 3, "10.1.2.3", 21), b"d", 5, (D, b"r", 500000, 4000, 4000, now - 50)),
        (("192.0.2.7", 4, "10.1.2.3", 21), b"ftp", 86400, (I, b"", 0, 0, 0, now))):
    entry = pureftpd.scoreboard_claim(S, pid, pureftpd.Peer(*peer), now - age)
    entry.login(account)
    entry.update(*update)
    with open("%s/client-%08d" % (S, pid), "r+b") as file:
        data = file.read()
        file.seek(0)
        file.write(data[:432] + b"\0" + data[432:] + bytes(7))
    for flags in ("-s", "-v", "-x"):
        for attempt in range(20):               # both in the same second, and time(2), which C asks, is a tick behind
            before = time.time()
            pair = show_theirs(flags), show_ours(flags)
            if before % 1 > 0.02 and int(time.time()) == int(before):
                break
        theirs.append(pair[0])
        ours.append(pair[1])
print(json.dumps([theirs, ours]))
"""


UPLOAD_SCRIPT = """#!/bin/sh
{ echo "$# $1"; env | grep ^UPLOAD_ | LC_ALL=C sort; echo "id $(id -u) $(id -g) $(id -G)"; echo "at $(pwd)"
  echo "in $(readlink /proc/self/fd/0)"; echo "pid $$"; echo .; } > REPORT
case $1 in *hang*) exec sleep 60;; esac
"""


class UploadscriptTest(unittest.TestCase):
    """A pipe, and uploadscript running a script that reports how it was called."""

    def setUp(self):
        self.base = tempfile.mkdtemp()
        self.addCleanup(shutil.rmtree, self.base)
        os.chmod(self.base, 0o755)
        self.statedir = self.base + "/state"
        pureftpd.statedir_prepare(self.statedir)
        os.mkfifo(self.base + "/report")
        os.chmod(self.base + "/report", 0o666)
        self.report_end = os.open(self.base + "/report", os.O_RDWR)
        self.addCleanup(os.close, self.report_end)
        self.script = self.base + "/script"
        self.write_file(self.script, UPLOAD_SCRIPT.replace("REPORT", self.base + "/report").encode(), 0o755)
        self.create()

    def create(self):
        self.holder = pureftpd.uploadpipe_create(self.statedir)
        self.addCleanup(os.close, self.holder)

    @staticmethod
    def write_file(path, data=b"", mode=0o640):
        with open(path, "wb") as file:
            file.write(data)
        os.chmod(path, mode)
        return os.fsencode(path)

    def start(self, *argv):
        """uploadscript as a process of its own."""
        code = "import pureftpd, sys; sys.exit(pureftpd.tool_uploadscript(sys.argv[1:]))"
        process = subprocess.Popen([sys.executable, "-c", code, "--statedir", self.statedir, "-r", self.script, *argv],
                                   stdin=subprocess.DEVNULL, stderr=subprocess.PIPE, env={**os.environ, "MARK": "1"},
                                   cwd=os.path.dirname(pureftpd.__file__) or ".")
        self.addCleanup(self.stop, process)
        return process

    def stop(self, process):
        if process.poll() is None:
            process.terminate()
        process.wait()
        if process.stderr:
            process.stderr.close()

    def announce(self, path, account=b"joe"):
        os.write(self.holder, pureftpd.uploadpipe_message(account, path))

    def report(self):
        """What the next script run said, as a list of lines."""
        text = b""
        while not text.endswith(b"\n.\n"):
            self.assertTrue(select.select([self.report_end], [], [], 20)[0], "no script was run: %r" % text)
            text += os.read(self.report_end, 1)
        return text.decode("utf-8", "surrogateescape").splitlines()[:-1]

    def wait_until(self, condition, what):
        deadline = time.monotonic() + 20
        while not condition():
            self.assertLess(time.monotonic(), deadline, what)
            time.sleep(0.01)


class Uploadscript(UploadscriptTest):
    def test_arguments_and_environment(self):
        path = self.write_file(self.base + "/caf\N{LATIN SMALL LETTER E WITH ACUTE} $(x) 'q'", b"12345", 0o4640)
        self.start()
        self.announce(path, b"jo e")
        lines = self.report()
        self.assertEqual(lines[0], "1 " + path.decode())
        facts = dict(line.split("=", 1) for line in lines if line.startswith("UPLOAD_"))
        self.assertEqual((facts["UPLOAD_SIZE"], facts["UPLOAD_PERMS"], facts["UPLOAD_VUSER"]), ("5", "4640", "jo e"))
        self.assertEqual((facts["UPLOAD_UID"], facts["UPLOAD_GID"]), (str(os.geteuid()), str(os.getegid())))
        self.assertTrue({"at /", "in /dev/null"} <= set(lines))
        if os.geteuid() == 0:
            self.assertEqual((facts["UPLOAD_USER"], facts["UPLOAD_GROUP"]), ("root", "root"))

    def test_only_regular_files_are_passed_on_and_in_order(self):
        os.symlink(self.script, self.base + "/link")
        os.mkdir(self.base + "/directory")
        process = self.start()
        for name in ("missing", "link", "directory", "report", "script", "state/../script"):
            self.announce(os.fsencode(self.base + "/" + name))
        self.assertEqual([self.report()[0] for _ in range(2)],
                         ["1 " + self.base + "/script", "1 " + self.base + "/state/../script"])
        complaints = [process.stderr.readline() for _ in range(4)]
        self.assertTrue(all(b"nothing run for" in line for line in complaints), complaints)

    def test_garbage_between_announcements(self):
        self.start()
        os.write(self.holder, b"\0\2\1\0\2joe\1relative\0" + b"x" * 9000 + b"\2half")
        self.announce(os.fsencode(self.script))
        self.assertEqual(self.report()[0], "1 " + self.script)

    def test_a_hanging_and_a_dying_script_do_not_stop_the_next(self):
        hang = self.write_file(self.base + "/hang")
        process = self.start("--timeout", "1")
        self.announce(hang)
        self.announce(os.fsencode(self.script))
        hanging = next(line for line in self.report() if line.startswith("pid ")).split()[1]
        self.addCleanup(os.kill, int(hanging), signal.SIGKILL)
        self.assertEqual(self.report()[0], "1 " + self.script)
        self.write_file(self.script, b"#!/nonexistent\n", 0o755)
        self.announce(os.fsencode(self.script))
        self.assertIn(b"No such file", process.stderr.readline())
        good = UPLOAD_SCRIPT.replace("REPORT", self.base + "/report") + "kill -9 $$\n"
        os.replace(self.write_file(self.script + ".new", good.encode(), 0o755), self.script)
        for _ in range(2):
            self.announce(os.fsencode(self.script))
            self.report()

    def test_programs_past_their_time_are_few_and_reaped(self):
        hang = self.write_file(self.base + "/hang")
        late, pids = [], []
        script = os.fsencode(self.script)
        with mock.patch("pureftpd.UPLOADSCRIPT_LATE", 2):
            for _ in range(4):
                pureftpd.uploadscript_run(script, pureftpd.UploadMessage(b"", hang), 0.01, late)
                pids += [int(line[4:]) for line in self.report() if line.startswith("pid ")]
        self.assertEqual([process.poll() for process in late], [None, None])
        for process in late:
            process.kill()
            process.wait()
        for pid in pids:
            with self.assertRaises(ChildProcessError):          # the killed ones are no zombies
                os.waitpid(pid, os.WNOHANG)

    def test_it_goes_on_when_its_pipe_was_replaced(self):
        self.start()
        self.announce(os.fsencode(self.script))
        self.report()
        for name in pureftpd.UPLOADPIPE_NAME, pureftpd.UPLOADPIPE_LOCK:
            os.unlink("%s/%s" % (self.statedir, name))
        self.create()
        self.announce(os.fsencode(self.script))
        self.assertEqual(self.report()[0], "1 " + self.script)

    def test_it_stops_without_its_pid_file(self):
        process = self.start("-p", self.base + "/pid")
        self.announce(os.fsencode(self.script))
        self.report()
        os.unlink(self.base + "/pid")
        process.terminate()
        self.assertEqual((process.wait(20), process.stderr.read()), (0, b""))

    def test_it_waits_for_the_pipe_and_stops_on_term_with_its_pid_file(self):
        os.unlink("%s/%s" % (self.statedir, pureftpd.UPLOADPIPE_NAME))
        process = self.start("-p", self.base + "/pid")
        os.symlink(self.script, self.base + "/pid")
        self.create()
        self.announce(os.fsencode(self.script))
        self.report()
        with open(self.base + "/pid") as file:
            self.assertEqual(file.read(), "%d\n" % process.pid)
        self.assertFalse(os.path.islink(self.base + "/pid"))
        process.terminate()
        self.assertEqual(process.wait(), 0)
        self.assertFalse(os.path.lexists(self.base + "/pid"))

    def test_daemonize(self):
        process = self.start("-B")
        self.assertEqual(process.wait(), 0)
        self.announce(os.fsencode(self.script))
        self.report()
        with open(self.statedir + "/pure-uploadscript.pid") as file:
            pid = int(file.read())
        self.assertNotEqual(pid, process.pid)
        os.kill(pid, signal.SIGTERM)
        self.wait_until(lambda: not os.path.exists(self.statedir + "/pure-uploadscript.pid"), "it does not stop")

    @unittest.skipUnless(os.geteuid() == 0, "needs root")
    def test_the_script_is_the_user_for_good(self):
        for argv, wanted in ((("-u", "1234", "-g", "2345"), "id 1234 2345 2345"), (("-g", "2345"), "id 0 2345 2345"),
                             ((), "id 0 0 0")):
            process = self.start(*argv)
            self.announce(os.fsencode(self.script))
            self.assertIn(wanted, self.report())
            self.stop(process)

    def test_mistakes(self):
        for argv, wanted in (((), "name a program"), (("-r", "script"), "absolute path"), (("-r", "/no"), "-r /no"),
                             (("-r", "/bin/sh", "x"), "takes no arguments"),
                             (("-r", "/bin/sh", "-u", "joe"), "-u joe")):
            err = io.StringIO()
            with self.subTest(argv), contextlib.redirect_stderr(err):
                self.assertEqual(pureftpd.tool_uploadscript([*argv]), 255)
                self.assertIn(wanted, err.getvalue())
        with self.assertRaises(pureftpd.ConfigError):
            pureftpd.tool_identity(3999999999, None)

    def test_an_untrusted_pipe_is_refused_at_once(self):
        os.chmod("%s/%s" % (self.statedir, pureftpd.UPLOADPIPE_NAME), 0o644)
        process = self.start()
        self.assertEqual(process.wait(), 255)
        self.assertIn(b"mode 0644", process.stderr.read())

    @unittest.skipUnless(can_run_original(), "needs root, unshare and the original's programs")
    def test_the_original_runs_it_alike(self):
        path = self.write_file(self.base + "/file of \xe9", b"123", 0o2604)
        self.start()
        self.announce(path)
        ours = [line for line in self.report() if not line.startswith("pid ")]
        command = ('mount -t tmpfs none /run; mkfifo -m 600 /run/pure-ftpd.upload.pipe; '
                   '(printf "\\2joe\\1%s\\0" "$2"; sleep 60) > /run/pure-ftpd.upload.pipe & exec "$0" -r "$1"')
        original = subprocess.Popen(["unshare", "-m", "sh", "-c", command, FTPWHO_ORIGINAL + "/pure-uploadscript", self.script,
                                     path], start_new_session=True)
        theirs = [line for line in self.report() if not line.startswith("pid ")]
        os.killpg(original.pid, signal.SIGKILL)
        original.wait()
        self.assertEqual(ours, theirs)


# ==== Tests: authd ================================================================================


AUTHD_ORIGINALS = os.pathsep.join((os.environ.get("PATH", ""), "/usr/sbin", "/opt/pureftpd-orig/usr/sbin"))
ASKED = (b"account:joe\npassword:$(rm -rf /); \"' \xc3\xa9\nlocalhost:10.0.0.1\nlocalport:21\npeer:2001:db8::1\n"
           b"sni_name:ftp.example\nencrypted:1\nend\n")
# runs tool_authd with the time limits and options it is given: SECONDS OPTION...
AUTHD_RUNNER = "import sys, pureftpd\npureftpd.AUTHD_SECONDS = float(sys.argv[1])\n" \
         "serve = pureftpd.authd_serve\npureftpd.authd_serve = lambda *a: serve(*a, float(sys.argv[1]))\n" \
         "sys.exit(pureftpd.tool_authd(sys.argv[2:]))\n"


class AuthdRequests(unittest.TestCase):
    def test_variables(self):
        self.assertEqual(pureftpd.authd_environment(ASKED), {
            b"AUTHD_ACCOUNT": b"joe", b"AUTHD_PASSWORD": b"$(rm -rf /); \"' \xc3\xa9", b"AUTHD_LOCAL_IP": b"10.0.0.1",
            b"AUTHD_LOCAL_PORT": b"21", b"AUTHD_REMOTE_IP": b"2001:db8::1", b"AUTHD_CLIENT_SNI_NAME": b"ftp.example",
            b"AUTHD_ENCRYPTED": b"1"})
        short = b"account:a:b\npassword:\nunknown:x\nend\n"
        self.assertEqual(pureftpd.authd_environment(short), {b"AUTHD_ACCOUNT": b"a:b"})

    def test_what_is_no_request(self):
        for request in (b"", b"end", b"account:joe\n", b"account:joe\nend", ASKED.replace(b"joe", b"jo\x00e"),
                        ASKED.replace(b"joe", b"jo\te"), ASKED.replace(b"joe", b"jo\x7fe"),
                        ASKED.replace(b":21\n", b":21;x\n"), ASKED.replace(b"10.0.0.1", b"$(id)"),
                        ASKED.replace(b"2001:db8::1", b"1 2"), ASKED.replace(b"encrypted:1", b"encrypted:2"),
                        ASKED.replace(b"ftp.example", b"a`b`")):
            with self.subTest(request), self.assertRaises(ValueError):
                pureftpd.authd_environment(request)


class AuthdTest(unittest.TestCase):
    def setUp(self):
        directory = tempfile.TemporaryDirectory()
        self.addCleanup(directory.cleanup)
        self.directory = directory.name
        self.socket = self.path("sock")

    def path(self, name):
        return os.path.join(self.directory, name)

    def program(self, text):
        with open(self.path("program"), "w") as file:
            file.write("#!/bin/sh\n" + text)
        os.chmod(self.path("program"), 0o755)
        return self.path("program")

    def start(self, text, *options, seconds=20):
        """authd with a program made of `text`, running when this comes back."""
        environment = {**os.environ, "PYTHONPATH": os.path.dirname(os.path.abspath(pureftpd.__file__)),
                       "PYTHONDONTWRITEBYTECODE": "1", "AUTHD_PASSWORD": "inherited", "AUTHD_ADDED": "inherited"}
        authd = subprocess.Popen(
            [sys.executable, "-W", "error", "-c", AUTHD_RUNNER, str(seconds), "-s", self.socket,
             "-r", self.program(text), "-p", self.path("pid"), *options], env=environment, stderr=subprocess.PIPE)
        self.addCleanup(authd.stderr.close)
        self.addCleanup(self.stop, authd)
        self.wait_for(lambda: self.has_pid() or authd.poll() is not None)
        return authd

    @unittest.skipUnless(os.path.exists("/proc/self/cmdline") and pureftpd.libc.library, "needs Linux's /proc, and ctypes")
    def test_ps_shows_the_tools_name(self):
        authd = subprocess.Popen([sys.executable, pureftpd.__file__, "authd", "-s", self.socket, "-r", self.program(""),
                                  "-p", self.path("pid")], stderr=subprocess.PIPE)
        self.addCleanup(authd.stderr.close)
        self.addCleanup(self.stop, authd)
        self.wait_for(lambda: self.has_pid() or authd.poll() is not None)
        shown = []
        for name in ("cmdline", "comm"):
            with open("/proc/%d/%s" % (authd.pid, name)) as file:
                shown.append(file.read().strip("\0\n"))
        self.assertEqual(shown, ["pure-authd"] * 2)

    def has_pid(self):
        return os.path.exists(self.path("pid")) and os.path.getsize(self.path("pid")) > 0

    def stop(self, authd):
        if authd.poll() is None:
            authd.terminate()
        self.assertEqual(authd.wait(20), 0)

    def wait_for(self, condition):
        deadline = time.monotonic() + 20
        while not condition():
            self.assertLess(time.monotonic(), deadline)
            time.sleep(0.005)

    def connect(self, request=ASKED):
        connection = socket.socket(socket.AF_UNIX)
        self.addCleanup(connection.close)
        connection.connect(self.socket)
        connection.settimeout(20)
        connection.sendall(request)
        return connection

    def answer(self, connection):
        answer = b""
        while block := connection.recv(65536):
            answer += block
        return answer

    def ask(self, request=ASKED):
        return self.answer(self.connect(request))

    def test_the_program_finds_the_request_in_its_environment(self):
        self.start("env | grep ^AUTHD_ | sort; cat; ls -l /proc/$$/fd | grep -c socket; echo error >&2")
        self.assertEqual(self.ask().decode().splitlines(), [
            "AUTHD_ACCOUNT=joe",
            "AUTHD_CLIENT_SNI_NAME=ftp.example", "AUTHD_ENCRYPTED=1", "AUTHD_LOCAL_IP=10.0.0.1", "AUTHD_LOCAL_PORT=21",
            "AUTHD_PASSWORD=$(rm -rf /); \"' \u00e9", "AUTHD_REMOTE_IP=2001:db8::1", "0"])

    def test_files_are_ours_and_go_away(self):
        authd = self.start("echo end")
        status = os.lstat(self.socket)
        self.assertTrue(stat.S_ISSOCK(status.st_mode))
        self.assertEqual(stat.S_IMODE(status.st_mode), 0o600)
        with open(self.path("pid")) as file:
            self.assertEqual(file.read(), f"{authd.pid}\n")
        self.stop(authd)
        self.assertEqual(os.listdir(self.directory), ["program"])

    def test_a_socket_left_behind_is_replaced_and_another_file_is_not(self):
        with socket.socket(socket.AF_UNIX) as old:
            old.bind(self.socket)
        self.start("echo end")
        self.assertEqual(self.ask(), b"end\n")
        with open(self.path("file"), "w"):
            pass
        with contextlib.redirect_stderr(io.StringIO()) as said:
            self.assertEqual(pureftpd.tool_authd(["-s", self.path("file"), "-r", "/bin/true"]), 255)
        self.assertEqual(said.getvalue().count("\n"), 1)
        self.assertTrue(os.path.exists(self.path("file")))

    def test_a_hanging_program_keeps_nobody_waiting_and_leaves_nothing(self):
        authd = self.start('test "$AUTHD_ACCOUNT" = joe && { sleep 1000 & echo $! >' + self.path("sleeper") +
                           "; sleep 1000; }\necho end", seconds=0.5)
        hanging = self.connect()
        self.assertEqual(self.ask(b"account:ann\nend\n"), b"end\n")
        self.assertEqual(self.answer(hanging), pureftpd.AUTHD_REFUSAL)
        with open(self.path("sleeper")) as file:
            sleeper = int(file.read())
        self.wait_for(lambda: not self.running(sleeper))
        self.assertIn(b"too long", authd.stderr.readline())

    def running(self, pid):
        try:
            with open(f"/proc/{pid}/stat") as file:
                return file.read().rpartition(")")[2].split()[0] != "Z"
        except FileNotFoundError:
            return False

    def test_the_end_takes_programs_along(self):
        authd = self.start(f"cd {self.directory}; echo $$ >new; mv new running; exec sleep 1000")
        self.connect()
        self.wait_for(lambda: os.path.exists(self.path("running")))
        with open(self.path("running")) as file:
            running = int(file.read())
        self.stop(authd)
        self.wait_for(lambda: not self.running(running))

    def test_many_requests_at_once(self):
        self.start("echo $AUTHD_ACCOUNT")
        connections = [self.connect(b"account:user%d\nend\n" % i) for i in range(60)]
        for i, connection in enumerate(connections):
            self.assertEqual(self.answer(connection), b"user%d\n" % i)

    def test_clients_that_say_nothing_or_vanish_or_lie(self):
        self.start("echo $AUTHD_ACCOUNT")
        silent = self.connect(b"account:")
        for request in (b"", b"account:joe\n"):
            connection = self.connect(request)
            connection.shutdown(socket.SHUT_WR)
            self.assertEqual(self.answer(connection), pureftpd.AUTHD_REFUSAL)
        self.connect().close()
        self.assertEqual(self.ask(b"x" * 4095), pureftpd.AUTHD_REFUSAL)
        self.assertEqual(self.ask(ASKED.replace(b"10.0.0.1", b"$(id)")), pureftpd.AUTHD_REFUSAL)
        silent.sendall(b"ann\nend\n")
        self.assertEqual(self.answer(silent), b"ann\n")

    def test_programs_that_break(self):
        for text, answer in (("kill -9 $$", pureftpd.AUTHD_REFUSAL), ("exit 1", b""), ("echo a; kill -9 $$", b"a\n"),
                             ("exec head -c 9000 /dev/zero", bytes(4095))):
            with self.subTest(text):
                authd = self.start(text)
                self.assertEqual(self.ask(), answer)
                self.stop(authd)
        authd = self.start("")
        os.unlink(self.path("program"))
        self.assertEqual(self.ask(), pureftpd.AUTHD_REFUSAL)

    def test_the_program_may_finish_its_work_after_the_answer(self):
        self.start(f"echo end; exec >&-; sleep 0.1; echo done >{self.path('done')}")
        self.assertEqual(self.ask(), b"end\n")
        self.wait_for(lambda: os.path.exists(self.path("done")))

    def test_wrong_options(self):
        for argv in ([], ["-s", self.socket], ["-r", "/bin/true"], ["-s", self.socket, "-r", "bin/true"], ["-Z"],
                     ["-s", self.socket, "-r", "/bin/true", "x"], ["-s", self.socket, "-r", "/bin/true", "-u", "joe"],
                     ["-s", self.socket, "-r", "/bin/true", "-u", "3999999999"]):
            with self.subTest(argv), contextlib.redirect_stderr(io.StringIO()) as said:
                self.assertEqual(pureftpd.tool_authd(argv), 254)
                self.assertRegex(said.getvalue(), r"\Apure-authd: .*\n\Z")
        with contextlib.redirect_stdout(io.StringIO()) as said:
            self.assertEqual(pureftpd.tool_authd(["-h"]), 0)
        self.assertIn("--socket", said.getvalue())
        with contextlib.redirect_stderr(io.StringIO()):
            self.assertEqual(pureftpd.tool_authd(["-s", self.path("none/sock"), "-r", "/bin/true"]), 255)
            self.assertEqual(pureftpd.tool_authd(["-s", "/" + "x" * 200, "-r", "/bin/true"]), 255)

    def test_in_the_background(self):
        authd = self.start("echo end", "-B")
        self.assertEqual(authd.wait(20), 0)
        self.wait_for(self.has_pid)
        self.assertEqual(self.ask(), b"end\n")
        with open(self.path("pid")) as file:
            os.kill(int(file.read()), signal.SIGTERM)
        self.wait_for(lambda: not os.path.exists(self.path("pid")))

    @unittest.skipUnless(os.geteuid() == 0, "needs root")
    def test_it_runs_as_whom_it_is_told(self):
        os.chmod(self.directory, 0o777)
        for options, expected in ((("-u", "1", "-g", "12345"), "1 12345 12345"), (("-u", "1"), "1 1 1"),
                                  (("-g", "12345"), "0 12345 12345")):
            with self.subTest(options):
                authd = self.start("echo `id -u` `id -g` `id -G`", *options)
                self.assertEqual(self.ask().decode().strip(), expected)
                self.stop(authd)

    @unittest.skipUnless(os.geteuid() == 0, "needs root")
    @unittest.skipUnless(shutil.which("pure-ftpd", path=AUTHD_ORIGINALS), "the original is not installed")
    def test_the_original_server_asks_it(self):
        """pure-ftpd on one end of a loopback connection, as inetd starts it."""
        os.chmod(self.directory, 0o755)
        self.start('test "$AUTHD_ACCOUNT:$AUTHD_PASSWORD:$AUTHD_REMOTE_IP" = "joe:se cret:127.0.0.1" &&\n'
                   "echo auth_ok:1\n"
                   f"echo uid:65534; echo gid:65534; echo dir:{self.directory}; echo end")
        with socket.create_server(("127.0.0.1", 0)) as listener:
            client = socket.create_connection(listener.getsockname(), 30)
            self.addCleanup(client.close)
            server, _ = listener.accept()
        with server:
            ftpd = subprocess.Popen([shutil.which("pure-ftpd", path=AUTHD_ORIGINALS), "-f", "none", "-H",
                                     "-l", "extauth:" + self.socket], stdin=server)
        self.addCleanup(ftpd.wait)
        self.addCleanup(ftpd.kill)
        self.assertIn(b"230", self.talk(client, b"joe", b"se cret"))

    def talk(self, client, user, password):
        """The reply to PASS."""
        with client.makefile("rb") as replies:
            self.reply(replies)
            client.sendall(b"USER %b\r\n" % user)
            self.reply(replies)
            client.sendall(b"PASS %b\r\n" % password)
            return self.reply(replies)

    def reply(self, replies):
        for line in replies:
            if line[3:4] == b" ":
                return line
        return b""


# ==== Tests: issue5 ===============================================================================


ISSUE5_DEBIAN = "/opt/pureftpd-orig/usr"
ISSUE5_ACCOUNTS = ((b"ann", b"ann/./", b""), (b"bob", b"bob", b""), (b"full", b"full/./", b"::::::8:10000"), (b"many", b"many/./", b"::::::300:3000000"),
                   (b"pace", b"pace/./", b":600000:900000"), (b"fair", b"fair/./", b":::2:1"), (b"lone", b"ann/./", b":::::1"))


def issue5_until(met, what="what was waited for"):
    """The first true value of met(); AssertionError when there is none in time."""
    end = time.monotonic() + EXAM_SECONDS
    while True:
        value = met()
        if value:
            return value
        if time.monotonic() > end:
            raise AssertionError("never seen: " + what)
        select.select([], [], [], 0.005)


def issue5_lines(path):
    try:
        with open(path, "rb") as file:
            return file.read().splitlines()
    except FileNotFoundError:
        return []


class Issue5Room:
    """A mount namespace with a /run of its own, and a user called ftp: where Debian's pure-ftpd and its tools, whose paths are built in, are alone."""

    def __init__(self, place):
        passwd = os.path.join(place, "passwd")
        with open("/etc/passwd") as old, open(passwd, "w") as new:
            new.writelines(line for line in old if not line.startswith("ftp:"))
            new.write("ftp:x:12346:12346::%s/ftp:/bin/sh\n" % place)
        script = ("mount -t tmpfs none /run && mount --bind '%s' /etc/passwd && echo ok && exec cat" % passwd)
        self.holder = subprocess.Popen(["unshare", "-m", "--propagation", "private", "sh", "-c", script], stdin=subprocess.PIPE,
                                       stdout=subprocess.PIPE, stderr=subprocess.DEVNULL)
        self.ready = self.holder.stdout.readline() == b"ok\n"
        self.enter = ["nsenter", "-t", str(self.holder.pid), "-m", "--"]

    def close(self):
        self.holder.communicate(timeout=EXAM_SECONDS)

    def tool(self, name, *args):
        """What a tool of the original says; (exit code, bytes)."""
        done = subprocess.run([*self.enter, ISSUE5_DEBIAN + "/" + name, *args], stdout=subprocess.PIPE, stdin=subprocess.DEVNULL, timeout=EXAM_SECONDS,
                              env={**os.environ, "TZ": "UTC"})
        return done.returncode, done.stdout


class Issue5Theirs:
    """Debian's pure-ftpd, started for each client as inetd does."""

    def __init__(self, room, switches):
        self.room, self.switches, self.processes = room, switches, []

    def connect(self):
        with socket.create_server(("127.0.0.1", 0)) as listener:
            ours = socket.create_connection(listener.getsockname())
            theirs = listener.accept()[0]
        with theirs:
            self.processes.append(subprocess.Popen([*self.room.enter, ISSUE5_DEBIAN + "/sbin/pure-ftpd", "-f", "none", "-H", *self.switches],
                                                   stdin=theirs, stdout=theirs, env={**os.environ, "TZ": "UTC"}))
        return deadline_socket(ours)

    def stop(self):
        for process in self.processes:
            process.wait(EXAM_SECONDS)


@unittest.skipIf(PROTOCOL_ORIGINAL, "starts the original itself")
class Issue5(Exam):
    """Whole servers, ours and Debian's, and what they leave behind."""

    room = None

    @classmethod
    def setUpClass(cls):
        super().setUpClass()
        hashed = pureftpd.crypt_in_python(b"secret", b"$1$saltsalt$")
        with open(cls.users, "wb") as file:
            file.write(pureftpd.puredb_build([
                (name, b"%s:%d:%d::%s/%s%s" % (hashed, EXAM_UID, EXAM_UID, os.fsencode(cls.place), home, more))
                for name, home, more in ISSUE5_ACCOUNTS]))

    def refresh(self):
        super().refresh()
        for home in ("ann", "full", "many", "pace", "fair"):
            self.clear(home)
        self.home = os.path.join(self.place, "ann")

    def clear(self, home):
        path = os.path.join(self.place, home)
        subprocess.run(["rm", "-rf", path], check=True)
        os.mkdir(path)
        self.give(path)
        return path

    def theirs(self, *switches):
        """Debian's server."""
        if not ROOT or not os.path.exists(ISSUE5_DEBIAN + "/sbin/pure-ftpd"):
            self.skipTest("needs root and Debian's pure-ftpd in " + ISSUE5_DEBIAN)
        cls = type(self)
        if cls.room is None:
            cls.room = Issue5Room(self.place)
            self.addClassCleanup(cls.room.close)
            self.addClassCleanup(setattr, cls, "room", None)
        if not cls.room.ready:
            self.skipTest("needs unshare(1) and nsenter(1)")
        server = Issue5Theirs(cls.room, ("-l", "puredb:" + self.users, *switches))
        self.addCleanup(server.stop)
        return server

    def login(self, server, user):
        client = ExamClient(server.connect())
        self.addCleanup(client.close)
        self.assertEqual(client.reply()[0], 220)
        code = client.code("USER " + user)
        if code == 331:
            code = client.code("PASS secret")
        self.assertEqual(code, 230, client.exchange())
        self.assertEqual(client.code("TYPE I"), 200)
        return client

    def leave(self, client, server=None):
        client.code("QUIT")
        self.assertTrue(client.at_end(), client.exchange())
        client.close()
        if isinstance(server, Issue5Theirs):
            server.stop()

    def upload(self, client, command, content):
        """The code of an upload, during which the server may hang up on the data connection."""
        with client.passive() as data:
            code = client.code(command)
            if code != 150:
                return code
            with contextlib.suppress(ConnectionError):
                data.sendall(content)
        return client.reply()[0]

    def abort_upload(self, client, command, content, path):
        """The codes of an upload of which `content` came, then ABOR."""
        size = len(content) + (os.stat(path).st_size if command.startswith("APPE") else 0)
        with client.passive() as data:
            self.assertEqual(client.code(command), 150, client.exchange())
            data.sendall(content)
            issue5_until(lambda: os.path.exists(path) and os.stat(path).st_size == size, path)
            client.send(b"ABOR\r\n")
            codes = client.reply()[0], client.reply()[0]
        return codes


# ---- quotas --------------------------------------------------------------------------------------


def issue5_recount(home):
    """(files and directories, bytes) in a home."""
    files = size = 0
    for directory, names, leaves in os.walk(home):
        files += len(names) + len(leaves)
        size += sum(os.lstat(os.path.join(directory, leaf)).st_size for leaf in leaves)
    quota = os.path.join(home, ".ftpquota")
    return (files - 1, size - os.stat(quota).st_size) if os.path.exists(quota) else (files, size)


def issue5_quota(home):
    with open(os.path.join(home, ".ftpquota"), "rb") as file:
        return tuple(map(int, file.read().split()))


class Issue5Quotas(Issue5):
    """`full` may have 8 files and 10000 bytes."""

    # what is done, and whether the original's count is right (facts 16: REST + STOR counts a file twice, -0 too)
    STEPS = (
        "STOR a 100", "STOR a 40", "STOR a 0", "STOR a 300", "APPE a 10", "APPE new 7", "MKD d", "MKD d", "STOR d/x 1", "RMD d", "DELE d/x", "RMD d", "RMD d",
        "STOR b 50", "RN b a", "RN a a", "RN a c", "DELE c", "DELE c", "DELE new", "STOR d/missing 5", "MKD e", "STOR e/1 1000", "RN e f", "DELE f/1", "RMD f",
        "ABORT part 1000", "ABORT part 400", "ABORTAPPE part 30", "DELE part", "STOR exact 10000", "STOR more 1", "STOR exact 5", "STOR over 10001",
        "STOR over 300000", "STOR exact 20", "STOR 2 1", "STOR 3 1", "MKD 4", "MKD 5", "STOR 6 1", "STOR 7 1", "STOR 8 1", "MKD 9", "STOR 9 1",
        "DELE 7", "STOR 7 9000", "APPE 7 800", "ALLO 100", "ALLO 500", "DELE 8", "ALLO 100", "ALLO 500", "TEXT 8 line", "DELE exact", "DELE 8",
    )

    def step(self, client, home, step):
        """The codes that answer a step."""
        verb, name, *rest = step.split()
        if verb in ("STOR", "APPE"):
            return self.upload(client, verb + " " + name, b"x" * int(rest[0]))
        if verb == "REST":
            client.code("REST " + rest[0])
            return self.upload(client, "STOR " + name, b"x" * int(rest[1]))
        if verb == "RN":
            return client.code("RNFR " + name), client.code("RNTO " + rest[0])
        if verb in ("ABORT", "ABORTAPPE"):
            command = "APPE " if verb == "ABORTAPPE" else "STOR "
            return self.abort_upload(client, command + name, b"x" * int(rest[0]), os.path.join(home, name))
        if verb == "TEXT":
            client.code("TYPE A")
            codes = self.upload(client, "STOR " + name, b"one\r\ntwo\r\n\r")
            client.code("TYPE I")
            return codes
        return client.code(step)

    def play_steps(self, server, steps):
        """[(step, codes, .ftpquota after it, recount)]"""
        home = self.clear("full")
        client = self.login(server, "full")
        result = []
        for step in steps:
            codes = self.step(client, home, step)
            result.append((step, codes, issue5_quota(home), issue5_recount(home)))
        self.leave(client, server)
        return result

    def test_the_file_is_the_originals_after_every_step(self):
        for switches in (), ("-r",):
            steps = self.STEPS if not switches else ("STOR a 100", "STOR a 40", "MKD a", "STOR a 7", "DELE a.1", "RN a a.2", "STOR x 9")
            with self.subTest(switches=switches):
                ours = self.play_steps(self.server(*switches), steps)
                for step, codes, quota, count in ours:
                    self.assertEqual(quota, count, (step, codes))
                theirs = self.play_steps(self.theirs(*switches), steps)
                for mine, debian in zip(ours, theirs):
                    self.assertEqual(mine[:3], debian[:3])

    def test_the_file_is_a_recount_where_the_originals_is_not(self):
        steps = ("STOR a 100", "REST a 50 100", "REST a 150 10", "REST a 200 1", "REST a 10 5", "STOR b 50", "APPE b 9900", "STOR b 100", "STOR a 9000", "REST b 90 9000",
                 "ABORT a 77", "ABORT new 78", "STOR a 20", "APPE a 5", "RN a b", "STOR over 20000", "STOR b 20000")
        for switches in (), ("-0",), ("-r",), ("-0", "-r"):
            with self.subTest(switches=switches):
                for step, codes, quota, count in self.play_steps_of_ours(switches, steps):
                    self.assertEqual(quota, count, (step, codes))

    def play_steps_of_ours(self, switches, steps):
        home, server = self.clear("full"), self.server(*switches)
        client = self.login(server, "full")
        for step in steps:
            if step.startswith("ABORT") and switches:
                continue                                    # elsewhere: the file has another name meanwhile
            codes = self.step(client, home, step)
            yield step, codes, issue5_quota(home), issue5_recount(home)
        yield "no data connection", self.unconnected(client), issue5_quota(home), issue5_recount(home)
        self.assertEqual(self.cut_off(client, home, server), issue5_recount(home))
        self.assertFalse([name for name in os.listdir(home) if name.startswith(".pureftpd")])

    def unconnected(self, client):
        """The code of an upload for which the client listens no more."""
        client.active().close()
        return client.code("STOR unconnected")

    def cut_off(self, client, home, server):
        """The client goes away in the middle of an upload: the quota file after that."""
        before = set(os.listdir(home))
        with client.passive() as data:
            self.assertEqual(client.code("STOR gone"), 150, client.exchange())
            data.sendall(b"x" * 123)
            issue5_until(lambda: any(os.stat(os.path.join(home, name)).st_size == 123 for name in set(os.listdir(home)) - before), "an upload")
            pid = [record.pid for record in pureftpd.scoreboard_read(self.statedir(server)) if record.account == b"full"][-1]
            client.close()
        issue5_until(lambda: not os.path.exists("/proc/%d" % pid) if os.path.exists("/proc/self") else True, "the end of the session")
        return issue5_quota(home)

    def test_the_file_is_out_of_the_users_reach(self):
        ways = (".ftpquota", "./.ftpquota", "/.ftpquota", "sub/../.ftpquota", "//.ftpquota", "sub/.ftpquota", "x.ftpquota.y")
        commands = ("RETR", "STOR", "APPE", "DELE", "RNFR", "MKD", "RMD", "SITE CHMOD 777", "MFMT 20200101000000", "RNTO")
        seen = {}
        for side, start in (("ours", self.server), ("theirs", self.theirs)):
            home = self.clear("full")
            server = start()
            client = self.login(server, "full")
            self.assertEqual((client.code("MKD sub"), self.upload(client, "STOR mine", b"x")), (257, 226))
            seen[side] = {}
            for way in ways:
                for command in commands:
                    if command == "RNTO":
                        self.assertEqual(client.code("RNFR mine"), 350)
                    seen[side][command, way] = client.code("%s %s" % (command, way))
            self.assertEqual(issue5_quota(home), (2, 1))
            self.assertEqual(stat.S_IMODE(os.stat(os.path.join(home, ".ftpquota")).st_mode), 0o600)
            self.leave(client, server)
            if side == "ours":
                self.assertEqual(set(seen[side].values()), {553}, seen[side])
        self.assertEqual(seen["ours"], seen["theirs"])

    def test_eight_sessions_at_once(self):
        home, server = self.clear("many"), self.server()
        failures, codes = [], []

        def work(number):
            try:
                rng, client = random.Random(number), self.login(server, "many")
                for _ in range(40):
                    name = rng.choice("abcdefgh")
                    pick = rng.random()
                    if pick < 0.5:
                        codes.append(self.upload(client, "STOR " + name, bytes(rng.choice((0, 10, 70000, 400000, 1500000)))))
                    elif pick < 0.65:
                        codes.append(self.upload(client, "APPE " + name, bytes(rng.choice((5, 300000)))))
                    elif pick < 0.8:
                        client.code("DELE " + name)
                    elif pick < 0.9:
                        client.code("RNFR " + name)
                        client.code("RNTO " + rng.choice("abcdefgh"))
                    else:
                        client.code("MKD d%d" % number)
                        client.code("RMD d%d" % rng.randrange(8))
                self.leave(client)
            except BaseException as error:
                failures.append("%r" % error)

        threads = [threading.Thread(target=work, args=(number,)) for number in range(8)]
        for thread in threads:
            thread.start()
        while any(thread.is_alive() for thread in threads):
            with contextlib.suppress(FileNotFoundError):     # gone between two looks
                self.assertLessEqual(issue5_recount(home)[1], 3000000)
            for thread in threads:
                thread.join(0.01)
        self.assertEqual(failures, [])
        self.assertEqual(issue5_quota(home), issue5_recount(home))
        self.assertLessEqual({226, 552}, set(codes))

    def statedir(self, server):
        return os.path.join(server.process.args[server.process.args.index("--statedir") + 1])

    def test_n_is_for_those_without_a_quota_of_their_own(self):
        server = self.server("-n", "3:1")
        client = self.login(server, "ann")
        self.assertEqual(self.upload(client, "STOR a", bytes(1 << 20)), 226)
        self.assertEqual(self.upload(client, "STOR b", bytes(1)), 552)
        self.assertEqual(issue5_quota(self.home), (1, 1 << 20))
        client = self.login(server, "full")
        self.assertEqual(self.upload(client, "STOR a", bytes(10001)), 552)

    def test_a_file_that_cannot_be_understood_refuses_uploads(self):
        home, server = self.clear("full"), self.server()
        for content in (b"", b"one two\n", b"1\n", b"-5 3\n", b"\0\0\0"):
            with self.subTest(content):
                with open(os.path.join(home, ".ftpquota"), "wb") as file:
                    file.write(content)
                self.give(os.path.join(home, ".ftpquota"))
                client = self.login(server, "full")
                self.assertEqual(self.upload(client, "STOR a", b"x"), 451 if content else 226)
                self.assertEqual(client.code("DELE a"), 550 if content else 250)
                self.leave(client)
        server.wait_for("quota file /.ftpquota: .*uploads are refused")


# ---- transfer logs -------------------------------------------------------------------------------

ISSUE5_NAMES = (b"plain", b"with space", b'quote"d', b"per%cent", b"caf\xc3\xa9", b"latin\xe9", b"a|b<c>&;'", b"#+=~@!$^*(){}[]?,:", b"-dash", b"x" * 200)
ISSUE5_MASKS = {
    "clf": (rb"\[[^]]*\]", b"[TIME]"),
    "w3c": (rb"^\d{4}-\d\d-\d\d \d\d:\d\d:\d\d|^#Software.*|^#Date.*", b"TIME"),
    "stats": (rb"^\d+ [0-9a-f]+\.[0-9a-f]+", b"TIME ID"),
    "xferlog": (rb"^\w{3} \w{3} \d\d \d\d:\d\d:\d\d \d{4}", b"TIME"),
}


class Issue5Logs(Issue5):
    maxDiff = None
    FORMS = ("clf", "stats", "w3c", "xferlog")

    def log_switches(self, side, forms=FORMS):
        """Switches for logs in a place of their own; and the place."""
        directory = os.path.join(self.place, "logs-" + side)
        subprocess.run(["rm", "-rf", directory], check=True)
        os.mkdir(directory)
        return [word for form in forms for word in ("-O", "%s:%s/%s" % (form, directory, form))], directory

    def transfers(self, client, home):
        """Transfers of all kinds."""
        for name in ISSUE5_NAMES:
            self.assertEqual(client.store(b"STOR " + name, b"content")[0], 226, client.exchange())
            self.assertEqual(client.fetch(b"RETR " + name)[::2], (226, b"content"), client.exchange())
        self.assertEqual(client.store("STOR big", bytes(300000))[0], 226)
        self.assertEqual(client.store("APPE big", b"0123456789")[0], 226)
        self.assertEqual(client.store("APPE other", b"0123")[0], 226)
        self.assertEqual((client.code("REST 300001"), client.fetch("RETR big")[::2]), (350, (226, b"123456789")))
        self.assertEqual((client.code("REST 300010"), client.fetch("RETR big")[0]), (350, 226))
        self.assertEqual((client.code("REST 4"), client.store("STOR other", b"45")[0]), (350, 226))
        self.assertEqual(client.store("STOR empty", b"")[0], 226)
        self.assertEqual(client.fetch("RETR empty")[::2], (226, b""))
        self.assertEqual(client.fetch("RETR missing")[0], 550)
        self.assertIn(client.store("STOR missing/x", b"")[0], (550, 553))
        self.assertEqual((client.code("MKD sub"), client.code("CWD sub"), client.store("STOR ../sub/x", b"1")[0]), (257, 250, 226))
        self.assertEqual((client.fetch("RETR x")[0], client.fetch("RETR /sub/../sub//x" if home == self.home else "RETR x")[0]), (226, 226))
        self.assertEqual((client.code("CWD .."), client.fetch("LIST")[0]), (250, 226))
        os.symlink("sub", os.path.join(home, "link"))
        os.symlink("sub/x", os.path.join(home, "leaf"))
        self.assertEqual((client.fetch("RETR link/x")[0], client.store("STOR link/y", b"1")[0], client.fetch("RETR leaf")[0]), (226, 226, 226))
        self.assertEqual((client.code("CWD link"), client.fetch("RETR x")[0], client.code("CWD /" if client.say("PWD")[1].startswith(b'257 "/sub') else "CWD " + home)),
                         (250, 226, 250))
        client.code("TYPE A")
        self.assertEqual(client.store("STOR text", b"one\r\ntwo\r\n")[0], 226)
        self.assertEqual(client.fetch("RETR text")[::2], (226, b"one\r\ntwo\r\n"))
        client.code("TYPE I")
        self.assertEqual(self.abort_upload(client, "STOR aborted", b"x" * 321, os.path.join(home, "aborted"))[0], 426)
        self.assertEqual(client.store("STOU", b"unique")[0], 226)

    def logged(self, directory, form, mask=True):
        lines = issue5_lines(os.path.join(directory, form))
        pattern, instead = ISSUE5_MASKS[form]
        lines = [re.sub(pattern, instead, line) for line in lines]
        return [re.sub(rb"pureftpd\.[0-9a-f]{8}\.[0-9a-f]{2}\.[0-9a-f]{4}", b"UNIQUE", line) for line in lines]

    def both_logs(self, user, switches, play, forms=FORMS):
        """Where the logs of either server are, after a session each. Debian's writes one format only."""
        logs = {}
        for side, start in (("ours", self.server), ("theirs", self.theirs)):
            words, logs[side] = self.log_switches(side, forms)
            for log in zip(words[::2], words[1::2]) if side == "theirs" else (words,):
                self.refresh()
                server = start(*log, *switches)
                client = self.login(server, user)
                play(client)
                self.leave(client, server)
        return logs

    def test_a_log_that_cannot_be_is_told_at_the_start(self):
        self.server("-O", "clf:%s/nowhere/log" % self.place).wait_for("transfer log .*/nowhere/log: No such file or directory")

    def test_lines_are_the_originals(self):
        for user, home, switches, forms in (("ann", "ann", (), self.FORMS), ("bob", "bob", (), ("stats",)), ("bob", "bob", ("-A",), ("w3c",)),
                                            ("full", "full", (), ("clf", "stats"))):
            with self.subTest(user, switches=switches):
                def play(client):
                    if user != "full":
                        self.transfers(client, os.path.join(self.place, home))
                    else:                                   # what a quota cuts off is in the log, too
                        self.assertEqual(self.upload(client, "STOR a", bytes(5000)), 226)
                        self.assertEqual(self.upload(client, "STOR over", bytes(5001)), 552)
                logs = self.both_logs(user, switches, play, forms)
                for form in forms:
                    with self.subTest(form):
                        ours, theirs = self.logged(logs["ours"], form), self.logged(logs["theirs"], form)
                        if user == "full":
                            ours, theirs = ([re.sub(rb"\b5\d{3}\b|\b0\b", b"N", line) for line in lines] for lines in (ours, theirs))
                        self.assertEqual(ours, theirs)
                        self.assertEqual(stat.S_IMODE(os.stat(os.path.join(logs["ours"], form)).st_mode), 0o600)
                if "stats" in forms:
                    self.decoded(logs)

    def decoded(self, logs):
        """statsdecode says of both stats logs what the original says of them."""
        for directory in logs.values():
            path = os.path.join(directory, "stats")
            done = subprocess.run([sys.executable, "-c", "import sys, pureftpd; sys.exit(pureftpd.main(sys.argv))", "statsdecode", path],
                                  stdout=subprocess.PIPE, timeout=EXAM_SECONDS, env={**os.environ, "TZ": "UTC"})
            self.assertEqual((done.returncode, done.stdout), self.room.tool("bin/pure-statsdecode", path))

    def test_anonymous_lines_are_the_originals(self):
        def play(client):
            self.put("file", b"content", base=self.ftp, uid=EXAM_UID)
            self.assertEqual(client.fetch("RETR file")[0], 226)
            self.assertEqual(client.store("STOR new one", b"x")[0], 226)
            self.assertIn(client.store("STOR file", b"x")[0], (550, 553))
        logs = self.both_logs("ftp", ("-e", "-M"), play)
        for form in self.FORMS:
            with self.subTest(form):
                self.assertEqual(self.logged(logs["ours"], form), self.logged(logs["theirs"], form))

    def events(self, directory):
        return [json.loads(line) for line in issue5_lines(os.path.join(directory, "json"))]

    def test_json_tells_of_every_event(self):
        for user, home, chrooted in ("ann", "ann", True), ("bob", "bob", False), ("ftp", "ftp", True):
            with self.subTest(user):
                self.refresh()
                words, directory = self.log_switches("ours", ("json",))
                server = self.server(*words)
                top = os.path.join(self.place, home)
                if user != "ftp":
                    stranger = ExamClient(server.connect())
                    self.addCleanup(stranger.close)
                    self.assertEqual((stranger.reply()[0], stranger.code('USER ev"il'), stranger.code("PASS x")), (220, 331, 530))
                self.put("old", b"12345", base=top, uid=EXAM_UID)
                client = self.login(server, user)
                wanted = [] if user == "ftp" else [{"event": "refusal", "user": 'ev"il', "host": "127.0.0.1"}]
                wanted.append({"event": "login"})
                client.fetch("RETR old")
                client.store("STOR new", b"123")
                wanted += [{"event": "download", "path": top + "/old", "bytes": 5, "complete": True},
                           {"event": "upload", "path": top + "/new", "bytes": 3, "complete": True}]
                if user != "ftp":
                    self.abort_upload(client, "STOR part", b"1234", os.path.join(top, "part"))
                    self.play(client, "MKD d -> 257\nRNFR new -> 350\nRNTO d/newer -> 250\nDELE d/newer -> 250\nRMD d -> 250\nDELE d -> 550\nRMD d -> 550\nMKD part -> 550")
                    wanted += [{"event": "upload", "path": top + "/part", "bytes": 4, "complete": False}, {"event": "mkdir", "path": top + "/d"},
                               {"event": "rename", "path": top + "/new", "to": top + "/d/newer"},
                               {"event": "delete", "path": top + "/d/newer", "size": 3}, {"event": "rmdir", "path": top + "/d"}]
                self.leave(client)
                wanted.append({"event": "logout", "downloaded": 5, "uploaded": 3 if user == "ftp" else 7})
                events = issue5_until(lambda: len(self.events(directory)) >= len(wanted) and self.events(directory), "the events")
                for event, sought in zip(events, wanted):
                    with self.subTest(sought["event"]):
                        sought = {"user": user, **sought}
                        self.assertEqual({key: event.get(key) for key in sought}, sought, event)
                        self.assertAlmostEqual(event["time"], time.time(), delta=60)
                        self.assertRegex(event["session"], "^[0-9a-f]+[.][0-9a-f]+$")
                self.assertEqual(len(events), len(wanted), events)
                self.assertEqual(len({event["session"] for event in events if event["event"] != "refusal"}), 1)
                self.assertTrue(all(event["reason"] for event in events if event["event"] == "refusal"))

    def test_a_session_too_many_is_a_refusal(self):
        words, directory = self.log_switches("ours", ("json",))
        server = self.server(*words)
        self.login(server, "lone")
        client = ExamClient(server.connect())
        self.addCleanup(client.close)
        self.assertEqual((client.reply()[0], client.code("USER LONE".lower()), client.code("PASS secret")), (220, 331, 421))
        event = issue5_until(lambda: [e for e in self.events(directory) if e["event"] == "refusal"], "the refusal")[0]
        self.assertEqual((event["user"], event["host"]), ("lone", "127.0.0.1"))
        self.assertIn("1 sessions", event["reason"])

    def test_no_name_forges_a_line_or_a_field(self):
        words, directory = self.log_switches("ours", (*self.FORMS, "json"))
        server = self.server(*words)
        rng = random.Random(5)
        names = [bytes(rng.choice(b' "%|\t\r\x0b\x1b\x7f\x80\xff\\\'ab1') for _ in range(rng.randrange(1, 30))) for _ in range(60)]
        names += [b'x" 200 5', b'x" 200 5\r127.0.0.1 - root', b"x 226 root 5", b"x b _ i r root ftp 1 * c", b'","event":"login', "\u2028\u202e".encode()]
        client, stored = self.login(server, "ann"), []
        for name in names:
            if client.store(b"STOR " + name, b"x")[0] == 226:
                stored.append(max((os.path.join(os.fsencode(self.home), n) for n in os.listdir(os.fsencode(self.home))), key=lambda p: os.stat(p).st_mtime_ns))
                self.assertEqual(client.code(b"DELE " + os.path.basename(stored[-1])), 250)
        for user in (b'a" b [c] % \x1b', b"a\x0bb c d"):
            stranger = ExamClient(server.connect())
            self.addCleanup(stranger.close)
            self.assertEqual((stranger.reply()[0], stranger.code(b"USER " + user), stranger.code("PASS x")), (220, 331, 530))
        self.leave(client)
        self.assertGreater(len(stored), 40)
        parsed = {
            "clf": rb'127\.0\.0\.1 - ann \[[^]]+\] "PUT ([^ "]+)" 200 1',
            "w3c": rb"\S+ \S+ 127\.0\.0\.1 \[\]created (\S+) 226 ann 1",
            "stats": rb"\d+ [0-9a-f.]+ ann 127\.0\.0\.1 U 1 0 (.+)",
            "xferlog": rb"\S+ \S+ \S+ \S+ \d{4} 0 127\.0\.0\.1 1 (\S+) b _ i r ann ftp 1 \* c",
        }
        percent = lambda path: re.sub(rb"%(..)", lambda m: bytes.fromhex(m[1].decode()), path)  # noqa: E731
        decode = {
            "clf": percent, "w3c": percent, "xferlog": bytes,
            "stats": lambda path: re.sub(rb"\\(x..|\\)", lambda m: b"\\" if m[1] == b"\\" else bytes.fromhex(m[1][1:].decode()), path),
        }
        for form, pattern in parsed.items():
            lines = [line for line in issue5_lines(os.path.join(directory, form)) if not line.startswith(b"#")]
            paths = [re.fullmatch(pattern, line) for line in lines]
            self.assertTrue(all(paths), [line for line, path in zip(lines, paths) if not path])
            wanted = [re.sub(rb"[\0-\x20\x7f]", b"_", path) for path in stored] if form == "xferlog" else stored
            self.assertEqual([decode[form](match[1]) for match in paths], wanted, form)
        events = [event for event in self.events(directory) if event["event"] == "upload"]
        paths = [bytes.fromhex(event["path_hex"]) if "path_hex" in event else event["path"].encode() for event in events]
        self.assertEqual(paths, stored)
        self.assertEqual(len([event for event in self.events(directory) if event["event"] == "refusal"]), 2)

    def test_a_log_that_was_moved_away_is_opened_anew(self):
        for user in "ann", "bob":
            words, directory = self.log_switches("ours", ("w3c", "json"))
            client = self.login(self.server(*words, patches="pureftpd.LOGS_SECONDS = -1"), user)
            self.assertEqual(client.store("STOR before", b"x")[0], 226)
            for form in "w3c", "json":
                os.rename(os.path.join(directory, form), os.path.join(directory, form + ".1"))
            self.assertEqual(client.store("STOR after", b"x")[0], 226)
            self.leave(client)
            for form in "w3c", "json":
                old, new = (b"\n".join(issue5_lines(os.path.join(directory, form + end))) for end in (".1", ""))
                self.assertIn(b"/before", old)
                self.assertNotIn(b"/after", old)
                self.assertIn(b"/after", new)
                self.assertNotIn(b"/before", new)
            self.assertTrue(issue5_lines(os.path.join(directory, "w3c"))[0].startswith(b"#Software"))

    @unittest.skipUnless(ROOT and sys.platform == "linux", "needs root and Linux, to make a small disk")
    def test_a_full_disk_harms_no_session(self):
        mounts = """
pureftpd.libc.call("unshare", 0x20000)
pureftpd.libc.call("mount", b"none", b"/", None, 0x44000, None)
pureftpd.libc.call("mount", b"none", b"%s", b"tmpfs", 0, b"size=4096")
"""
        disk = os.path.join(self.place, "disk")
        os.mkdir(disk)
        try:
            server = self.server("-O", "clf:%s/log" % disk, "-O", "json:%s/json" % disk, patches=mounts % disk)
        except AssertionError as error:
            self.skipTest("no mount namespaces here: %s" % error)
        client = self.login(server, "ann")
        for number in range(60):
            self.assertEqual(client.store("STOR " + "x" * 150 + str(number), b"x")[0], 226)
        self.leave(client)
        server.wait_for("transfer log %s/log: No space left on device" % disk)
        for name in ("log", "json"):
            with open("/proc/%d/root%s/%s" % (server.process.pid, disk, name), "rb") as file:
                content = file.read()
            self.assertTrue(content == b"" or content.endswith(b"\n"), content[-200:])


# ---- ratios and bandwidth ------------------------------------------------------------------------


class Issue5Ratios(Issue5):
    def test_ratios_are_the_originals(self):
        for user, switches in (("fair", ()), ("ann", ("-Q", "1:2")), ("ann", ("-q", "1:2")), ("ftp", ("-q", "1:2", "-M")), ("ftp", ("-Q", "3:1")),
                               ("fair", ("-Q", "1:100"))):
            with self.subTest(user, switches=switches):
                seen = {}
                for side, start in (("ours", self.server), ("theirs", self.theirs)):
                    self.refresh()
                    home = os.path.join(self.place, user)
                    self.put("file", b"x" * 100, base=home, uid=EXAM_UID)
                    server = start(*switches)
                    client = self.login(server, user)
                    codes = seen[side] = []
                    for number, size in enumerate((49, 1, 50, 150)):
                        codes.append(client.store("STOR up%d" % number, b"y" * size)[0])
                        codes.append(client.fetch("RETR file")[0])
                        codes.append((client.code("REST 50"), client.fetch("RETR file")[0]))
                    self.leave(client, server)
                self.assertEqual(seen["ours"], seen["theirs"])


class Issue5Bandwidth(Issue5):
    """Averages within 3%, and never half a second ahead or behind. All transfers at once: they sleep most of the time."""

    SECONDS = 1.5

    def measure(self, server, user, up, rate):
        """(what to compare with SECONDS, the farthest that the transfer was ahead or behind in seconds) of one transfer."""
        client = self.login(server, user)
        size = int(rate * self.SECONDS)
        if up:
            with client.passive() as data:
                self.assertEqual(client.code("STOR up"), 150, client.exchange())
                started = time.monotonic()
                data.sendall(bytes(size))
            self.assertEqual(client.reply()[0], 226, client.exchange())
            return time.monotonic() - started, 0.0
        worst = moved = 0
        with client.passive() as data:
            client.send(b"RETR down%d\r\n" % size)
            self.assertEqual(client.reply()[0], 150, client.exchange())
            started = time.monotonic()
            while True:
                got = len(data.recv(65536))
                if not got:
                    break
                moved += got
                worst = max(worst, abs(moved / rate - (time.monotonic() - started)))
            seconds = time.monotonic() - started
        self.assertEqual((moved, client.reply()[0]), (size, 226), client.exchange())
        return seconds, worst

    def test_rates(self):
        server = self.server("-T", "1000:1200", "-t", "500:700")
        cases = [("ann", True, 1024000), ("ann", False, 1228800), ("pace", True, 600000), ("pace", False, 900000), ("ftp", True, 512000), ("ftp", False, 716800)]
        for user, up, rate in cases:
            if not up:
                self.put("down%d" % (rate * self.SECONDS), bytes(int(rate * self.SECONDS)), base=os.path.join(self.place, user), uid=EXAM_UID)
        results = {}

        def work(case):
            try:
                results[case] = self.measure(server, *case)
            except BaseException as error:
                results[case] = error

        threads = [threading.Thread(target=work, args=(case,)) for case in cases]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        for case, result in results.items():
            with self.subTest(case):
                self.assertIsInstance(result, tuple)
                self.assertAlmostEqual(result[0], self.SECONDS, delta=0.03 * self.SECONDS)
                self.assertLess(result[1], 0.5)


# ---- the scoreboard ------------------------------------------------------------------------------

ISSUE5_TOOL = "import sys, pureftpd; sys.exit(pureftpd.main(['pureftpd.py', *sys.argv[1:]]))"


class Issue5Scoreboard(Issue5):
    PATCHES = "pureftpd.PROGRESS_SECONDS = 0.05"

    def statedir(self, server):
        return server.process.args[server.process.args.index("--statedir") + 1]

    def ftpwho(self, server, *args):
        done = subprocess.run([sys.executable, "-c", ISSUE5_TOOL, "ftpwho", "-H", "--statedir", self.statedir(server), *args], stdout=subprocess.PIPE,
                              timeout=EXAM_SECONDS)
        self.assertEqual(done.returncode, 0)
        return done.stdout

    def sessions(self, server):
        return json.loads(self.ftpwho(server, "--json"))["sessions"]

    def test_transfers_are_seen_moving(self):
        server = self.server(patches=self.PATCHES)
        self.put("big|file", bytes(4 << 20), base=os.path.join(self.place, "pace"))
        down, up, idle = self.login(server, "pace"), self.login(server, "pace"), self.login(server, "ann")
        self.assertEqual(down.code("REST 65536"), 350)
        with down.passive() as source, up.passive() as sink:
            self.assertEqual((down.code("RETR big|file"), up.code("STOR new")), (150, 150))
            sender = threading.Thread(target=lambda: self.feed(sink))
            eater = threading.Thread(target=lambda: self.eat(source))
            sender.start()
            eater.start()
            try:
                seen = issue5_until(lambda: self.moving(server), "speed and progress of both transfers")
                text, verbose, shell = (self.ftpwho(server, *args).decode() for args in ((), ("-v",), ("-s",)))
            finally:
                for sock in (source, sink):
                    with contextlib.suppress(OSError):
                        sock.shutdown(socket.SHUT_RDWR)
                sender.join()
                eater.join()
        by_state = {session["state"]: session for session in seen}
        self.assertEqual(len(seen), 3)
        self.assertEqual((by_state["idle"]["account"], by_state["idle"]["file"], by_state["idle"]["bytes"]), ("ann", "", 0))
        got = by_state["download"]
        self.assertEqual((got["account"], got["file"], got["total_bytes"], got["restart"]), ("pace", "big|file", 4 << 20, 65536))
        self.assertEqual(got["percent"], round(100 * got["bytes"] / (4 << 20)))
        self.assertLess(got["bytes_per_second"], 3 * 900000)
        self.assertEqual((by_state["upload"]["account"], by_state["upload"]["total_bytes"], by_state["upload"]["percent"]), ("pace", None, None))
        rows = dict((fields[3], fields) for fields in (re.split(r"(?<!\\)\|", line) for line in shell.splitlines()))
        self.assertEqual(rows[" DL "][1:2] + rows[" DL "][4:9:1][:3], ["pace", "big\\|file", "127.0.0.1", "127.0.0.1"])
        self.assertEqual(rows[" DL "][9], "4096")
        self.assertTrue(0 < int(rows[" DL "][8]) <= 4096 and 0 < int(rows[" DL "][10]) <= 100 and int(rows[" DL "][11]) > 0, rows)
        for table in text, verbose:
            self.assertRegex(table, r"\| *\d+ \| pace    \| 00:00 \|  DL  \| big\|file +\|")
            self.assertRegex(table, r"\| *\d+[KM]/s\|  +\d+% \| ->")
        self.assertIn("Total size:     4096 Transferred:", verbose)
        for client in (down, up, idle):
            client.close()
        issue5_until(lambda: not self.sessions(server), "an empty scoreboard")

    def moving(self, server):
        """The sessions, once both transfers have moved and have a speed."""
        sessions = self.sessions(server)
        moving = [session for session in sessions if session["state"] != "idle" and session["bytes"] and session["bytes_per_second"]]
        return sessions if len(moving) == 2 else None

    @staticmethod
    def feed(sock):
        with contextlib.suppress(OSError):
            while True:
                sock.send(bytes(65536))

    @staticmethod
    def eat(sock):
        with contextlib.suppress(OSError):
            while sock.recv(65536):
                pass

    def test_fields_are_the_originals(self):
        rows = {}
        for side, start in (("ours", lambda: self.server(patches=self.PATCHES)), ("theirs", self.theirs)):
            self.refresh()
            server = start()
            self.put("a|b c", bytes(4 << 20), base=os.path.join(self.place, "pace"))
            clients = [self.login(server, "pace") for _ in range(3)]
            self.assertEqual((clients[0].code("MKD d"), clients[0].code("REST 2000000")), (257, 350))
            data = [client.passive() for client in clients[:2]]
            for sock in data:
                self.addCleanup(sock.close)
            self.assertEqual((clients[0].code("RETR ./d/../a|b c"), clients[1].code("STOR d/new")), (150, 150))
            data[1].send(bytes(300000))
            self.assertTrue(data[0].recv(65536))

            def look():
                if side == "ours":
                    text = self.ftpwho(server, "-s")
                else:
                    text = self.room.tool("sbin/pure-ftpwho", "-n", "-s")[1]
                lines = [re.split(r"(?<!\\)\|", line) for line in text.decode().splitlines()]
                return lines if len(lines) == 3 and sum(int(line[8]) > 0 for line in lines) == 2 else None
            lines = issue5_until(look, "two transfers")
            for line in lines:
                self.assertGreater(int(line[0]), 1)
                self.assertLess(int(line[2]), 60)
                self.assertIn(int(line[7]), [client.sock.getpeername()[1] for client in clients])
                if line[3] == " DL ":
                    self.assertAlmostEqual(int(line[10]), 100 * int(line[8]) / int(line[9]), delta=1.1)
                line[0] = line[2] = line[7] = line[8] = line[10] = line[11] = "N"
            rows[side] = sorted(lines)
            for client in clients:
                client.close()
            for sock in data:
                sock.close()
            if side == "theirs":
                server.stop()
            else:
                issue5_until(lambda: not self.sessions(server), "an empty scoreboard")
        self.assertEqual(rows["ours"], rows["theirs"])

    def test_a_killed_session_leaves_no_entry(self):
        server = self.server(patches=self.PATCHES)
        client = self.login(server, "ann")
        with client.passive() as data:
            self.assertEqual(client.code("STOR file"), 150)
            data.send(b"x")
            pid = issue5_until(lambda: [s["pid"] for s in self.sessions(server) if s["file"] == "file"], "the upload")[0]
            names = os.listdir(self.statedir(server))
            self.assertIn("client-%08d" % pid, names)
            os.kill(pid, signal.SIGKILL)
            self.assertTrue(client.at_end())
        issue5_until(lambda: "client-%08d" % pid not in os.listdir(self.statedir(server)), "the end of the entry")

    def test_sessions_per_user(self):
        server = self.server("-y", "2:1")
        try:
            for user, limit in (("ann", 2), ("bob", 2), ("ftp", 1), ("lone", 1)):
                with self.subTest(user):
                    clients = [self.login(server, user) for _ in range(limit)]
                    for name in {user, user.upper() if user == "ftp" else user}:
                        late = ExamClient(server.connect())
                        self.addCleanup(late.close)
                        self.assertEqual(late.reply()[0], 220)
                        code = late.code("USER " + name)
                        self.assertEqual(code if user == "ftp" else late.code("PASS secret"), 421)
                        self.assertTrue(late.at_end())
                    for _ in range(5):                      # whoever leaves makes room at once
                        self.leave(clients.pop())
                        clients.append(self.login(server, user))
        finally:
            for client in clients:
                client.close()

    def test_the_limit_holds_for_logins_at_once(self):
        server = self.server("-y", "2:1")
        clients = [ExamClient(server.connect()) for _ in range(8)]
        for client in clients:
            self.addCleanup(client.close)
            self.assertEqual((client.reply()[0], client.code("USER full")), (220, 331))
        for client in clients:
            client.send(b"PASS secret\r\n")
        self.assertEqual(sorted(client.reply()[0] for client in clients), [230] * 2 + [421] * 6)


# ---- upload scripts ------------------------------------------------------------------------------


class Issue5UploadScripts(Issue5):
    SCRIPT = """#!/bin/sh
{ echo "$# $1"; env | grep ^UPLOAD_ | LC_ALL=C sort; echo "in $(pwd)"; echo .; } >> '%s'
case $1 in *hang*) exec sleep 30;; *die*) kill -9 $$;; esac
"""

    def script(self):
        """A script that reports how it was called, and the file it reports to."""
        report, path = os.path.join(self.place, "report"), os.path.join(self.place, "script")
        with open(path, "w") as file:
            file.write(self.SCRIPT % report)
        os.chmod(path, 0o755)
        with contextlib.suppress(FileNotFoundError):
            os.unlink(report)
        return path, report

    def calls(self, report, count):
        """The first `count` calls, as lists of lines."""
        lines = issue5_until(lambda: issue5_lines(report).count(b".") >= count and issue5_lines(report), "%d calls" % count)
        text = b"\n".join(lines).decode("utf-8", "surrogateescape")
        return [call.strip("\n").split("\n") for call in (text + "\n").split("\n.\n") if call]

    def start(self, server, script, *args):
        """Our uploadscript."""
        statedir = server.process.args[server.process.args.index("--statedir") + 1]
        process = subprocess.Popen([sys.executable, "-c", ISSUE5_TOOL, "uploadscript", "-r", script, "--statedir", statedir, *args],
                                   cwd=os.path.dirname(os.path.abspath(pureftpd.__file__)), stdin=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        self.addCleanup(process.wait)
        self.addCleanup(process.terminate)
        return process

    def uploads(self, client, home, report):
        """Uploads of all kinds; how many of them a script hears of."""
        for name in ("plain", "with space", "caf\u00e9", "$(touch x);`x`'\""):
            self.assertEqual(client.store("STOR " + name, b"12345")[0], 226, client.exchange())
        self.calls(report, 4)                               # before the files change
        self.assertEqual(client.store("APPE plain", b"6")[0], 226)
        self.calls(report, 5)
        self.assertEqual((client.code("REST 3"), client.store("STOR plain", b"6")[0]), (350, 226))
        self.assertEqual((client.code("MKD sub"), client.store("STOR sub/empty", b"")[0]), (257, 226))
        self.assertEqual((client.code("CWD sub"), client.store("STOR deeper", b"1")[0]), (250, 226))
        self.abort_upload(client, "STOR aborted", b"x" * 9, os.path.join(home, "sub", "aborted"))
        self.assertEqual(client.store("STOR missing/x", b"1")[0], 553)
        self.assertEqual(client.fetch("RETR deeper")[0], 226)
        return 9

    def test_calls_are_the_originals(self):
        cases = (("ann", "ann", ()), ("bob", "bob", ()), ("ann", "ann", ("-r",)), ("ftp", "ftp", ("-M",)), ("full", "full", ()))
        for user, home, switches in cases:
            with self.subTest(user, switches=switches):
                calls = {}
                for side, start in (("ours", self.server), ("theirs", self.theirs)):
                    self.refresh()
                    script, report = self.script()
                    server = start("-o", *switches)
                    tool = self.start(server, script) if side == "ours" else self.start_theirs(script)
                    client = self.login(server, user)
                    if user == "full":
                        self.assertEqual((self.upload(client, "STOR over", bytes(10001)), self.upload(client, "STOR fits", b"12")), (552, 226))
                        count = 1
                    elif user == "ftp":
                        self.assertEqual((client.store("STOR new", b"1")[0], client.store("STOR new", b"2")[0]), (226, 550))
                        count = 1
                    elif switches:
                        self.assertEqual([client.store("STOR twice", b"1")[0] for _ in range(3)], [226] * 3)
                        count = 3
                    else:
                        count = self.uploads(client, os.path.join(self.place, home), report)
                    self.leave(client, server)
                    calls[side] = [[line for line in call if line != "UPLOAD_USER=ftp"] for call in self.calls(report, count)]
                    self.assertEqual(len(calls[side]), count, calls)
                    tool.terminate()
                    tool.wait()
                self.assertEqual(calls["ours"], calls["theirs"])

    def start_theirs(self, script):
        """Debian's uploadscript. Its server and it wait for each other."""
        subprocess.run([*self.room.enter, "sh", "-c", "rm -f /run/pure-ftpd.upload.*; mkfifo -m 600 /run/pure-ftpd.upload.pipe"], check=True)
        process = subprocess.Popen([*self.room.enter, ISSUE5_DEBIAN + "/sbin/pure-uploadscript", "-r", script, "-p", "/run/script.pid"],
                                   stdin=subprocess.DEVNULL)
        self.addCleanup(process.wait)
        self.addCleanup(process.kill)
        return process

    def test_without_a_reader_uploads_go_on_and_are_told_later(self):
        server = self.server("-o")
        client = self.login(server, "ann")
        for number in range(30):
            self.assertEqual(client.store("STOR %d" % number, b"x")[0], 226)
        self.leave(client)
        script, report = self.script()
        self.start(server, script)
        self.assertEqual([call[0] for call in self.calls(report, 30)], ["1 %s/%d" % (self.home, number) for number in range(30)])

    def test_a_script_that_hangs_or_dies_does_not_stop_the_next(self):
        server = self.server("-o", "-E")
        script, report = self.script()
        self.start(server, script, "--timeout", "1")
        client = self.login(server, "ann")
        for name in "hang", "die", "next":
            self.assertEqual(client.store("STOR " + name, b"x")[0], 226)
        self.assertEqual([os.path.basename(call[0]) for call in self.calls(report, 3)], ["hang", "die", "next"])

    def test_a_pipe_that_is_not_to_be_trusted_stops_no_upload(self):
        server = self.server("-o", "-D")
        statedir = server.process.args[server.process.args.index("--statedir") + 1]
        os.chmod(os.path.join(statedir, "pure-ftpd.upload.pipe"), 0o666)
        client = self.login(server, "ann")
        self.assertEqual(client.store("STOR file", b"x")[0], 226)
        server.wait_for("the upload script will not be called: .*mode 0666")


# ==== Tests: issue3 ===============================================================================


ISSUE3_ROOT = os.geteuid() == 0
ISSUE3_UID = 12345 if ISSUE3_ROOT else os.geteuid()
ISSUE3_PURE_PW, ISSUE3_PURE_FTPD = (
    shutil.which(name, path="/opt/pureftpd-orig/usr/bin:/opt/pureftpd-orig/usr/sbin:/usr/bin:/usr/sbin")
    for name in ("pure-pw", "pure-ftpd"))
ISSUE3_HASH = "$1$saltsalt$9xy1btjgzLYfb7hivXtC//"              # every hash here is of the password "secret"
# fmt: off
ISSUE3_HASHES = {
    "argon2id": "$argon2id$v=19$m=64,t=1,p=1$8hXdZ6AByyUB5RKnxdgUrA$NrHslYz3Ms/z45etgIvZd8xE3U9N/r4TbMwbcqoZuM4",
    "scrypt":   "$7$86..../....7lHqoreXby6vZfpHKjU1kzD41CgbaV8QdH5Xyz0FDT3$FEjmQzWTCXpTHloiRc.IMQb91ytmiiI.0BiV/v1YaR4",
    "sha512":   "$6$rounds=1000$saltsalt$LAV5VE5Y7w1d73x1mFNspYWUpazfmwv2SoepNXNKJ/otop/Zok96Hr8Q13LEv0DRY/x8v0/crpIjl8NJSAqXV/",
    "sha256":   "$5$rounds=1000$saltsalt$eKLZU9t9OoPWrqOQsoTIKG0aYkZ5rGOoOQhiIvoSWX2",
    "md5":      ISSUE3_HASH,
    "bcrypt":   "$2y$04$abcdefghijklmnopqrstuu2r9OfJnfCsdneAXAGHnS4UpFFP8WIrW",
    "yescrypt": "$y$j75$saltsaltsalt$jyf/lxrpdyAIshWRo1x5DRC6KIE7sNRRtjcomR3PgHA",
    "des":      "abNANd1rDfiNc",
}
# fmt: on
ISSUE3_NO_CRYPT = "sys.modules['crypt'] = sys.modules['_crypt'] = None"
ISSUE3_NOTHING = ISSUE3_NO_CRYPT + """
sys.modules['argon2'] = sys.modules['_argon2_cffi_bindings'] = None
pureftpd.LIBSODIUM = pureftpd.LIBARGON2 = pureftpd.LIBCRYPT = ()
"""
ISSUE3_DEFENDER = """
pureftpd.DEFENDER_PAUSE_MAX = pureftpd.DEFENDER_BUSY = 0.02
"""
ISSUE3_AUTHD = """
import sys, pureftpd
serve = pureftpd.authd_serve
pureftpd.authd_serve = lambda *args: (print("ready", flush=True), serve(*args))
sys.exit(pureftpd.main(["pureftpd.py", "authd", *sys.argv[1:]]))
"""
# fail2ban's own filter for pure-ftpd, without its translations and prefix; <HOST> as fail2ban 1.0 spells it, IPv4 and names.
ISSUE3_FAIL2BAN = (r"\(.+?@(?P<host>[\w.:-]+)\) \[WARNING\] Authentication failed for user \[.+\]\s*$")


def issue3_record(name, home, more="", hashed=ISSUE3_HASH):
    """A line of pureftpd.passwd for `name`; `more`: fields from the seventh on."""
    return "%s:%s:%d:%d::%s%s" % (name, hashed, ISSUE3_UID, ISSUE3_UID, home, ":" + more if more else "")


class Issue3(unittest.TestCase):
    """Whole servers, as their clients and the readers of their logs see them."""

    @classmethod
    def setUpClass(cls):
        cls.place = tempfile.mkdtemp()
        cls.addClassCleanup(shutil.rmtree, cls.place, ignore_errors=True)
        os.chmod(cls.place, 0o755)
        cls.home = cls.path("home")
        os.mkdir(cls.home)
        if ISSUE3_ROOT:
            os.chown(cls.home, ISSUE3_UID, ISSUE3_UID)

    @classmethod
    def path(cls, name):
        return os.path.join(cls.place, name)

    def database(self, name, *lines):
        """Make a pdb of lines of pureftpd.passwd, in the place of what was there; the -l for it."""
        records = [line.encode("latin-1").partition(b":")[::2] for line in lines]
        with open(self.path(name + ".new"), "wb") as file:
            file.write(pureftpd.puredb_build(records))
        os.rename(file.name, self.path(name))
        return "puredb:" + self.path(name)

    def user(self, name, more="", hashed=ISSUE3_HASH):
        return issue3_record(name, self.home + "/./", more, hashed)

    def server(self, *switches, patches=""):
        server = ExamDaemon(self.place, switches, patches)
        self.addCleanup(server.stop)
        return server

    def connect(self, server, source="127.0.0.1"):
        sock = socket.create_connection(("127.0.0.1", server.port), EXAM_SECONDS, (source, 0))
        client = ExamClient(deadline_socket(sock))
        self.addCleanup(client.close)
        return client

    def login(self, server, user, password="secret", source="127.0.0.1"):
        """(client, code, text) of the reply to PASS."""
        client = self.connect(server, source)
        self.assertEqual(client.reply()[0], 220, client.exchange())
        self.assertEqual(client.code("USER " + user), 331, client.exchange())
        return client, *client.say("PASS " + password)

    def code(self, server, user, password="secret", source="127.0.0.1"):
        """The code of the reply to PASS; the client has gone then."""
        client, code, _ = self.login(server, user, password, source)
        client.close()
        return code


class Issue3Hashes(Issue3):
    def codes(self, *switches, patches):
        lines = [self.user(name, hashed=hashed) for name, hashed in ISSUE3_HASHES.items()]
        server = self.server("-l", self.database("hashes.pdb", *lines), patches=patches)
        return server, {name: (self.code(server, name), self.code(server, name, "Secret")) for name in ISSUE3_HASHES}

    def test_every_kind_logs_in_without_the_crypt_module(self):
        server, codes = self.codes(patches=ISSUE3_NO_CRYPT)
        for name, hashed in ISSUE3_HASHES.items():
            with self.subTest(name):
                try:
                    pureftpd.password_verify(b"secret", hashed)
                except pureftpd.HashUnsupported:                # not on this machine: refused, and the log says why
                    self.assertEqual(codes[name], (530, 530))
                    server.wait_for(r"\[ERROR\] the password of %s cannot be checked: .*install" % name)
                else:
                    self.assertEqual(codes[name], (230, 530))

    def test_without_any_library_the_others_are_errors_that_say_what_to_install(self):
        server, codes = self.codes(patches=ISSUE3_NOTHING)
        for name in ("sha512", "sha256", "md5"):
            self.assertEqual(codes[name], (230, 530), name)
        for name, cure in (("argon2id", "argon2-cffi"), ("bcrypt", "libxcrypt"), ("yescrypt", "libxcrypt"), ("des", "libxcrypt")):
            self.assertEqual(codes[name], (530, 530), name)
            line = server.wait_for(r"\[ERROR\] the password of %s cannot be checked: .*" % name).group()
            self.assertIn("install", line)
            self.assertIn(cure, line)


class Issue3Interchange(Issue3):
    WEAK = "-C", "100000", "-M", "8192"                 # hashes that take no time, in both programs

    def tool(self, *words, code=0):
        """Run a program that asks for a password twice."""
        done = subprocess.run(words, input=b"s\xe9cret pass\n" * 2, stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
                              timeout=EXAM_SECONDS)
        self.assertEqual(done.returncode, code, done.stdout)

    def add(self, *program, users=(("joe", "-z", "0000-2359"),)):
        """Add users by pure-pw or ours; the -l for the database."""
        files = "-f", self.path("passwd"), "-F", self.path("users.pdb"), "-m"
        for name, *more in users:
            self.tool(*program, "useradd", name, "-u", str(ISSUE3_UID), "-g", str(ISSUE3_UID), "-d", self.home, *more, *files,
                      *self.WEAK)
        self.addCleanup(os.unlink, self.path("passwd"))
        self.addCleanup(os.unlink, self.path("users.pdb"))
        return "puredb:" + self.path("users.pdb")

    @unittest.skipUnless(ISSUE3_PURE_PW, "needs the original's pure-pw")
    def test_what_pure_pw_wrote_logs_in_here(self):
        method = self.add(ISSUE3_PURE_PW, users=(("joe", "-z", "0000-2359"), ("ann", "-r", "192.0.2.1")))
        server = self.server("-l", method)
        try:
            pureftpd.argon2_functions()
        except pureftpd.HashUnsupported as reason:
            self.assertEqual(self.code(server, "joe", "wrong"), 530)
            self.skipTest(str(reason))
        client, code, _ = self.login(server, "joe", "wrong")
        self.assertEqual(code, 530)
        client.send(b"PASS s\xe9cret pass\r\n")
        self.assertEqual(client.reply()[0], 230, client.exchange())
        client, code, _ = self.login(server, "ann", "wrong")
        client.send(b"PASS s\xe9cret pass\r\n")
        self.assertEqual(client.reply()[0], 530, client.exchange())
        server.wait_for(r"\[ann\] \[the account may not be used from 127\.0\.0\.1\]")

    @unittest.skipUnless(ISSUE3_PURE_FTPD and ISSUE3_ROOT, "needs root and the original's pure-ftpd")
    def test_what_ours_wrote_logs_in_at_the_original(self):
        method = self.add(sys.executable, pureftpd.__file__, "pw")
        with socket.create_server(("127.0.0.1", 0)) as listener:
            client = deadline_socket(socket.create_connection(listener.getsockname()))
            self.addCleanup(client.close)
            theirs, _ = listener.accept()
        with theirs:
            process = subprocess.Popen([ISSUE3_PURE_FTPD, "-l", method, "-H", "-E", "-f", "none"], stdin=theirs, stdout=theirs)
        self.addCleanup(process.wait)
        self.addCleanup(process.kill)
        exchange = ExamClient(client)
        exchange.reply()
        exchange.say(b"USER joe")
        self.assertEqual(exchange.say(b"PASS s\xe9cret pass")[0], 230, exchange.exchange())


class Issue3Rules(Issue3):
    """What is judged after the password."""

    def test_rules_of_the_account(self):
        hour = time.gmtime().tm_hour                            # the servers of the tests live in UTC
        later = "%02d00-%02d59" % ((hour + 2) % 24, (hour + 3) % 24)
        around = "%02d00-%02d59" % ((hour - 2) % 24, (hour + 2) % 24)
        rules = {                                               # allow_local:deny_local:allow_client:deny_client:time
            "plain": ("", 230, ""),
            "near": ("::127.0.0.0/8,192.0.2.1::", 230, ""),
            "named": ("::localhost::", 230, ""),
            "far": ("::192.0.2.0/24::", 530, r"may not be used from 127\.0\.0\.1"),
            "denied": (":::127.0.0.1:", 530, r"may not be used from 127\.0\.0\.1"),
            "both": ("::127.0.0.0/8:127.0.0.1:", 530, r"may not be used from 127\.0\.0\.1"),
            "here": ("127.0.0.1::::", 230, ""),
            "elsewhere": ("192.0.2.1::::", 530, r"may not be used at 127\.0\.0\.1"),
            "nothere": (":127.0.0.1:::", 530, r"may not be used at 127\.0\.0\.1"),
            "broken": ("::127.0.0.1/0::", 530, "may not be used from .*"),
            "now": ("::::" + around, 230, ""),
            "later": ("::::" + later, 530, "may not be used at this time"),
            "nonsense": ("::::9to5", 530, "field time should be like 900-1800.*"),
        }
        lines = [self.user(name, ":::::::" + rule) for name, (rule, _, _) in rules.items()]
        lines += [self.user("root").replace(":%d:" % ISSUE3_UID, ":0:", 1), self.user("letters", "x")]
        server = self.server("-l", self.database("rules.pdb", *lines))
        for name, (_, code, reason) in rules.items():
            with self.subTest(name):
                self.assertEqual(self.code(server, name), code)
                if reason:
                    server.wait_for(r"\(\?@127\.0\.0\.1\) \[WARNING\] Authentication failed for user \[%s\] \[.*%s\]$" % (name, reason))
                else:
                    server.wait_for(r"\(\?@127\.0\.0\.1\) \[INFO\] %s is now logged in$" % name)
        self.assertEqual(self.code(server, "far", "wrong"), 530)         # who does not know the password learns nothing of it
        server.wait_for(r"user \[far\] \[wrong password\]")
        server.wait_for(r"malformed access rule \[127\.0\.0\.1/0\]")
        for name in ("root", "letters"):
            self.assertEqual(self.code(server, name), 530)
            server.wait_for(r"Authentication failed for user \[%s\] \[its record in puredb is malformed" % name)

    def test_sessions_of_one_account(self):
        method = self.database("sessions.pdb", self.user("usual"), self.user("own", "::::2"), self.user("free", "::::0"))
        server = self.server("-l", method, "-y", "1:1")
        for name, most in (("usual", 1), ("own", 2)):
            clients = []
            for _ in range(most):
                client, code, _ = self.login(server, name)
                self.assertEqual(code, 230)
                clients.append(client)
            client, code, _ = self.login(server, name)
            self.assertEqual(code, 421)
            self.assertTrue(client.at_end())
            server.wait_for(r"Login refused for user \[%s\] \[%d sessions of this account are open already\]" % (name, most))
            self.assertEqual(self.code(server, name, "wrong"), 530)      # only who knows the password hears of it
            self.assertEqual(clients[0].code("QUIT"), 221)
            self.assertTrue(clients[0].at_end())
            self.assertEqual(self.code(server, name), 230)
        clients = [self.login(server, "free") for _ in range(3)]
        self.assertEqual([code for _, code, _ in clients], [230] * 3)

    def test_minimum_uid_and_addresses_for_anonymous_users(self):
        method = self.database("uid.pdb", self.user("joe"))
        if ISSUE3_ROOT:
            server = self.server("-l", method, "-u", str(ISSUE3_UID + 1))
            self.assertEqual(self.code(server, "joe"), 530)
            server.wait_for(r"user \[joe\] \[uid %d is below the minimum \(%d, -u\)\]" % (ISSUE3_UID, ISSUE3_UID + 1))
        for address, code in (("127.0.0.1", 331), ("192.0.2.1", 230)):
            server = self.server("-l", method, "-V", address)
            os.makedirs(self.path("ftp"), exist_ok=True)
            client = self.connect(server)
            client.reply()
            self.assertEqual(client.code("USER joe"), code, client.exchange())       # elsewhere everybody is anonymous

    def test_only_anonymous_users_or_none(self):
        method = self.database("anon.pdb", self.user("joe"), self.user("ftp"))
        os.makedirs(self.path("ftp"), exist_ok=True)
        server = self.server("-l", method, "-e")
        client = self.connect(server)
        self.assertIn(b"anonymous", client.reply()[1])
        self.assertEqual(client.code("USER joe"), 230, client.exchange())
        server.wait_for(r"\[INFO\] ftp is now logged in")
        server = self.server("-l", method, "-E")
        self.assertEqual(self.code(server, "ftp"), 230)         # an ordinary name
        self.assertEqual(self.code(server, "anonymous"), 530)
        client = self.connect(server)
        client.reply()
        self.assertEqual(client.code("USER"), 530)
        self.assertTrue(client.at_end())

    @unittest.skipUnless(ISSUE3_ROOT, "needs root")
    def test_members_of_the_trusted_group_are_not_locked_in(self):
        member = issue3_record("member", self.home)
        stranger = issue3_record("stranger", self.home).replace(":%d::" % ISSUE3_UID, ":%d::" % (ISSUE3_UID + 1))
        server = self.server("-l", self.database("group.pdb", member, stranger), "-a", str(ISSUE3_UID))
        for name, where in (("member", self.home), ("stranger", "/")):
            client, code, _ = self.login(server, name)
            self.assertEqual(code, 230)
            self.assertIn(b'"%s"' % where.encode(), client.say("PWD")[1])


class Issue3Chain(Issue3):
    def sqlite(self, name, *rows):
        path = self.path(name)
        with contextlib.closing(sqlite3.connect(path)) as connection, connection:
            connection.executescript(pureftpd.SQLITE_SCHEMA)
            connection.executemany("INSERT INTO users (login, hash, uid, gid, home) VALUES (?, ?, ?, ?, ?)",
                                   [(row, ISSUE3_HASH, ISSUE3_UID, ISSUE3_UID, self.home + "/./") for row in rows])
        return "sqlite:" + path

    def authd(self):
        """pure-authd with a program that knows ext, ann and puzzle (whose answer is none); the -l for it."""
        program, place = self.path("program"), self.path("authd.sock")
        with open(program, "w") as file:
            file.write('#!/bin/sh\ncase "$AUTHD_ACCOUNT:$AUTHD_PASSWORD" in\n'
                       'ext:secret|ann:secret|joe:external) printf "auth_ok:1\\nuid:%d\\ngid:%d\\ndir:%s/./\\n";;\n'
                       'ext:*|ann:*) echo auth_ok:-1;;\npuzzle:*) echo auth_ok:1;;\n*) echo auth_ok:0;;\nesac\necho end\n'
                       % (ISSUE3_UID, ISSUE3_UID, self.home))
        os.chmod(program, 0o755)
        environment = dict(os.environ, PYTHONPATH=os.path.dirname(os.path.abspath(pureftpd.__file__)), PYTHONDONTWRITEBYTECODE="1")
        process = subprocess.Popen([sys.executable, "-c", ISSUE3_AUTHD, "-s", place, "-r", program, "-p", self.path("authd.pid")],
                                   env=environment, stdout=subprocess.PIPE)
        self.addCleanup(process.stdout.close)
        self.addCleanup(process.wait)
        self.addCleanup(process.terminate)
        self.assertEqual(process.stdout.readline(), b"ready\n")
        return "extauth:" + place

    def test_not_found_goes_on_and_wrong_stops(self):
        puredb = self.database("chain.pdb", self.user("joe"))
        sqlite = self.sqlite("chain.db", "joe", "bob", "ann")
        with contextlib.closing(sqlite3.connect(self.path("chain.db"))) as connection, connection:
            connection.execute("UPDATE users SET hash = ? WHERE login != 'bob'",
                               (pureftpd.crypt_in_python(b"second", b"$1$saltsalt$").decode(),))
        server = self.server("-l", puredb, "-l", sqlite, "-l", self.authd())
        for user, password, code, reason in (
                ("joe", "secret", 230, ""),
                ("joe", "second", 530, "wrong password"),               # right in the second back end, which is not asked
                ("joe", "external", 530, "wrong password"),
                ("bob", "secret", 230, ""),
                ("bob", "no", 530, "wrong password"),
                ("ann", "second", 230, ""),
                ("ann", "secret", 530, "wrong password"),               # right in the third
                ("ext", "secret", 230, ""),
                ("ext", "no", 530, "refused by extauth"),
                ("puzzle", "x", 530, "extauth: an answer without uid"),
                ("nobody-knows", "x", 530, "no such user")):
            with self.subTest(user=user, password=password):
                self.assertEqual(self.code(server, user, password), code)
                server.wait_for(r"\[%s\] \[%s" % (user, reason) if reason else r"%s is now logged in" % user)

    def test_a_broken_back_end_lets_nobody_in_and_harms_no_other(self):
        sqlite = self.sqlite("good.db", "bob")
        self.database("bad.pdb", *[self.user("joe%d" % i) for i in range(50)])
        with open(self.path("bad.pdb"), "rb") as file:
            data = file.read()
        server = self.server("-l", sqlite, "-l", "puredb:" + self.path("bad.pdb"), "-l", self.sqlite("last.db", "zoe"))
        self.assertEqual([self.code(server, user) for user in ("bob", "joe7", "zoe")], [230, 230, 230])
        states = {"missing": None, "empty": b"", "garbage": os.urandom(len(data)), "of text": b"joe7:x:1:1\n" * 400,
                  "cut in its index": data[:600], "with wild offsets": data[:4] + b"\xff\xff\xff\xf0" * (len(data) // 4)}
        for name, content in states.items():
            with self.subTest(name):
                os.unlink(self.path("bad.pdb"))
                if content is not None:
                    with open(self.path("bad.pdb"), "wb") as file:
                        file.write(content)
                before = len(server.lines)
                client, code, _ = self.login(server, "joe7")
                self.assertEqual(code, 421)
                self.assertTrue(client.at_end())
                self.assertEqual(self.code(server, "zoe"), 421)         # it might be this one who knows zoe, and refuses
                self.assertEqual(self.code(server, "bob"), 230)
                with open(self.path("bad.pdb"), "wb") as file:          # for the unlink above
                    file.write(data)
                said = [line for line in server.lines[before:] if "[ERROR]" in line]
                self.assertEqual(len(said), 2, said)
                self.assertTrue(all("]: puredb: " + self.path("bad.pdb") in line and "Login not possible for user [" in line for line in said), said)
        self.assertEqual(self.code(server, "joe7"), 230)
        with open(self.path("bad.pdb"), "wb") as file:                  # half of its records are gone, its index is there
            file.write(data[:len(data) - 25 * len(self.user("joe10"))])
        codes = {self.code(server, "joe%d" % i) for i in range(10, 50, 4)}
        self.assertEqual(codes, {230, 421})
        self.assertFalse([line for line in server.lines if "bug:" in line])

    def test_a_changed_database_counts_at_the_next_login(self):
        server = self.server("-l", self.database("change.pdb", self.user("joe"), self.user("old")))
        self.assertEqual([self.code(server, user) for user in ("joe", "old", "new")], [230, 230, 530])
        other = pureftpd.crypt_in_python(b"changed", b"$1$saltsalt$").decode()
        self.database("change.pdb", self.user("joe", hashed=other), self.user("new"))
        self.assertEqual([self.code(server, user) for user in ("joe", "old", "new")], [530, 530, 230])
        self.assertEqual(self.code(server, "joe", "changed"), 230)

    @unittest.skipUnless(ISSUE3_ROOT and sys.platform.startswith("linux"), "needs root on Linux")
    def test_system_users(self):
        """In a mount namespace where /etc/passwd and /etc/shadow are files of ours."""
        shadows = {"sysjoe": ISSUE3_HASH, "sysold": ISSUE3_HASH + ":19000:0:99999:7::19001:", "locked": "!" + ISSUE3_HASH,
                   "noshell": ISSUE3_HASH, "shadowless": None, "empty": ""}
        with open("/etc/passwd") as passwd, open("/etc/shadow") as shadow:
            passwds, shadowed = passwd.read(), shadow.read()
        for name, hashed in shadows.items():
            shell = "/bin/false" if name == "noshell" else "/bin/sh"
            passwds += "%s:x:%d:%d::%s:%s\n" % (name, ISSUE3_UID, ISSUE3_UID, self.home, shell)
            if hashed is not None:
                shadowed += "%s:%s\n" % (name, hashed if hashed.count(":") else hashed + ":19000:0:99999:7:::")
        for name, text in (("passwd", passwds), ("shadow", shadowed), ("shells", "/bin/sh\n")):
            with open(self.path(name), "w") as file:
                file.write(text)
        patches = """
import ctypes
kernel = ctypes.CDLL(None)
assert kernel.unshare(0x20000) == 0 and kernel.mount(None, b"/", None, 0x44000, None) == 0
for name in ("passwd", "shadow", "shells"):
    assert kernel.mount(os.path.join(%r, name).encode(), b"/etc/" + name.encode(), None, 0x1000, None) == 0
""" % self.place
        probe = subprocess.run([sys.executable, "-c", "import os" + patches], stderr=subprocess.DEVNULL, timeout=EXAM_SECONDS)
        if probe.returncode:
            self.skipTest("no mount namespaces here")
        server = self.server("-l", "unix", "-A", patches=patches)
        for user, password, code, reason in (
                ("sysjoe", "secret", 230, ""), ("sysjoe", "no", 530, "wrong password"), ("sysold", "secret", 530, "the account has expired"),
                ("locked", "secret", 530, "wrong password"), ("locked", "", 530, "wrong password"),
                ("empty", "", 530, "wrong password"), ("noshell", "secret", 530, r"the shell \[/bin/false\] is not in"),
                ("shadowless", "x", 530, "wrong password"), ("root", "x", 530, ""), ("gone", "x", 530, "no such user")):
            with self.subTest(user=user, password=password):
                self.assertEqual(self.code(server, user, password), code)
                server.wait_for(r"for user \[%s\] \[%s" % (user, reason) if code != 230 else "%s is now logged in" % user)


class Issue3Guessing(Issue3):
    def test_a_stranger_cannot_tell_an_unknown_user(self):
        hashed = (pureftpd.crypt_in_python(b"secret", b"$6$rounds=20000$saltsalt$") or b"").decode()
        method = self.database("cost.pdb", *[self.user("joe%d" % i, hashed=hashed) for i in range(20)])
        server = self.server("-l", method, patches="""
check = pureftpd.login_account
def measured(setup, request, peer):
    start = pureftpd.time.process_time()
    try:
        return check(setup, request, peer)
    finally:
        setup.log.notice("%s took %d us" % (request.user.decode(), (pureftpd.time.process_time() - start) * 1e6))
pureftpd.login_account = measured
""")
        costs, texts = {"joe": [], "eve": []}, set()
        for i in range(20):
            for name in costs:
                client, code, text = self.login(server, "%s%d" % (name, i), "guess%d" % i)
                client.close()
                texts.add((code, text))
                costs[name].append(int(server.wait_for(r"%s%d took (\d+) us" % (name, i)).group(1)))
            if i > 5 and costs_agree(0.3, costs.values()):
                break
        else:
            self.fail(costs)
        self.assertEqual(len(texts), 1, texts)

    def test_six_tries_that_wait_longer_and_longer(self):
        server = self.server("-l", self.database("six.pdb", self.user("joe")), patches="pureftpd.FAILURE_SECONDS = 0.02")
        client = self.connect(server)
        client.reply()
        client.code("USER joe")
        for number in range(1, 7):
            start = time.monotonic()
            self.assertEqual(client.code("PASS wrong"), 530, client.exchange())
            self.assertGreaterEqual(time.monotonic() - start, 0.02 * number)
        self.assertTrue(client.at_end(), client.exchange())
        client = self.connect(server)
        client.reply()
        client.code("USER joe")
        self.assertEqual([client.code("PASS wrong") for _ in range(5)], [530] * 5)
        self.assertEqual(client.code("PASS secret"), 230, client.exchange())         # USER need not be said again
        client = self.connect(server)
        client.reply()
        client.send(b"USER joe\r\n" + b"PASS wrong\r\n" * 20 + b"PASS secret\r\n")   # all at once
        self.assertEqual([client.reply()[0] for _ in range(7)], [331] + [530] * 6)
        self.assertTrue(client.at_end(), client.exchange())
        self.assertEqual(len([line for line in server.lines if "[wrong password]" in line]), 6 + 5 + 6)

    def test_bans_by_address_that_end(self):
        server = self.server("-l", self.database("ban.pdb", self.user("joe")), "--banafter", "3",
                             patches=ISSUE3_DEFENDER + "defender = pureftpd.Defender\n"
                             "pureftpd.Defender = lambda after, seconds, never: defender(after, 0.5, never)")
        client, code, _ = self.login(server, "joe")             # somebody who is in stays in
        self.assertEqual(code, 230)
        self.assertEqual([self.code(server, "joe", "wrong") for _ in range(3)], [530] * 3)
        server.wait_for(r"\(\?@127\.0\.0\.1\) \[WARNING\] Banned for 0 seconds after 3 wrong passwords")
        turned_away = self.connect(server)
        self.assertEqual(turned_away.reply()[0], 421, turned_away.exchange())
        self.assertTrue(turned_away.at_end())
        self.assertEqual(client.code("NOOP"), 200)
        self.assertEqual(self.code(server, "joe", source="127.0.0.2"), 230)
        end = time.monotonic() + EXAM_SECONDS
        code = 421
        while code != 220 and time.monotonic() < end:           # each asks anew, until the half second is over
            turned_away.close()
            turned_away = self.connect(server)
            code = turned_away.reply()[0]
        self.assertEqual(code, 220)
        self.assertEqual(turned_away.code("USER joe"), 331)
        self.assertEqual(turned_away.code("PASS secret"), 230)

    def test_parallel_connections_do_not_help(self):
        server = self.server("-l", self.database("parallel.pdb", self.user("joe"), self.user("ann")), "--banafter", "5",
                             patches=ISSUE3_DEFENDER)
        clients = [self.connect(server) for _ in range(30)]
        for client in clients:
            client.send(b"USER joe\r\n" + b"PASS wrong\r\n" * 6)
        for client in clients:                                  # each is refused, or told nothing any more
            codes = []
            with contextlib.suppress(EOFError, ConnectionResetError):
                while True:
                    codes.append(client.reply()[0])
            self.assertIn(codes[:2], ([220, 331], [220], [421]), client.exchange())
            self.assertLessEqual(set(codes[2:]), {530})
        server.wait_for("Banned for 600 seconds")
        self.assertEqual(len([line for line in server.lines if "[wrong password]" in line]), 5)
        client = self.connect(server)
        self.assertEqual(client.reply()[0], 421)

    def test_own_logins_do_not_wash_a_guesser_clean(self):
        server = self.server("-l", self.database("wash.pdb", self.user("joe"), self.user("ann")), "--banafter", "4",
                             patches=ISSUE3_DEFENDER)
        for _ in range(4):
            self.assertEqual(self.code(server, "ann"), 230)
            self.assertEqual(self.code(server, "joe", "wrong"), 530)
        server.wait_for("Banned for")

    def test_those_who_are_never_banned(self):
        server = self.server("-l", self.database("never.pdb", self.user("joe")), "--banafter", "2", "--neverban", "127.0.0.0/31",
                             patches=ISSUE3_DEFENDER)
        self.assertEqual([self.code(server, "joe", "wrong") for _ in range(6)] + [self.code(server, "joe")], [530] * 6 + [230])
        self.assertEqual([self.code(server, "joe", "wrong", source="127.0.0.2") for _ in range(2)], [530] * 2)
        server.wait_for(r"\(\?@127\.0\.0\.2\) \[WARNING\] Banned")
        self.assertEqual(self.connect(server, source="127.0.0.2").reply()[0], 421)
        self.assertFalse([line for line in server.lines if "@127.0.0.1) [WARNING] Banned" in line])


class Issue3Log(Issue3):
    def test_fail2ban_reads_it_and_nobody_else_writes_it(self):
        forged = "(?@6.6.6.6) [WARNING] Authentication failed for user [x]"
        names = ["joe", "nobody", forged, "x] [WARNING] " + forged, "x@6.6.6.6) [WARNING] Authentication failed for user [x]",
                 "a\r\x0b\x85\u2028" + forged, "]", "[", " ", "%s%n", "\xff\xfe", "x" * 200]
        server = self.server("-l", self.database("f2b.pdb", self.user("joe")), "-d", "-d", "--banafter", "5", "--neverban",
                             "127.0.0.1", patches=ISSUE3_DEFENDER)
        for name in names:
            client = self.connect(server)
            client.reply()
            client.send(b"USER " + name.encode("utf-8") + b"\r\n")
            self.assertEqual(client.reply()[0], 331)
            self.assertEqual(client.code("PASS wrong"), 530)
            client.code("CLNT " + forged)
            client.code("x@6.6.6.6) [WARNING] Authentication failed for user [x]")
            client.close()
        client, code, _ = self.login(server, "joe")
        self.assertEqual(code, 230)
        for command in ("MKD ", "CWD ", "SIZE ", "DELE ", "RNFR ", "RETR "):
            client.code(command + "a@6.6.6.6) [WARNING] Authentication failed for user [x]")
        self.assertEqual(client.code("QUIT"), 221)
        server.wait_for("Logout")
        hosts = [m.group("host") for m in (re.search(ISSUE3_FAIL2BAN, line) for line in server.lines) if m]
        self.assertEqual(hosts, ["127.0.0.1"] * len(names))
        path = os.path.join(os.path.dirname(os.path.abspath(pureftpd.__file__)), "README.md")
        if not os.path.exists(path):
            self.skipTest("no README.md here")
        with open(path, encoding="utf-8") as readme:
            ours = re.search(r"^failregex = \^%\(__prefix_line\)s(.*)$", readme.read(), re.M).group(1)
        ours = r"^[\d-]+ [\d:]+ pure-ftpd: " + ours.replace("<HOST>", r"(?P<host>[\w.:-]+)")
        hosts = [m.group("host") for m in (re.search(ours, line) for line in server.lines) if m]
        self.assertEqual(hosts, ["127.0.0.1"] * len(names))

    def test_no_password_in_any_log_or_session(self):
        logs = [word for form in pureftpd.TRANSFERLOG_FORMATS for word in ("-O", form + ":" + self.path("log." + form))]
        authd = Issue3Chain.authd(self)
        server = self.server("-l", self.database("secret.pdb", self.user("joe")), "-l", authd, "-d", "-d", *logs)
        secrets = ["Tr0ub4dor&3x%d" % i for i in range(9)]
        client = self.connect(server)
        client.reply()
        said = [client.code(command) for command in ("PASS " + secrets[0], "pass " + secrets[1], "USER joe", "PASS " + secrets[2],
                                                     "pAsS  " + secrets[3], "PASS\t" + secrets[4], "P@SS " + secrets[5],
                                                     "PASS " + secrets[6] * 40, "PASS secret", "PASS " + secrets[7], "MKD made")]
        self.assertEqual(said[8], 230, client.exchange())
        self.assertEqual(self.code(server, "nobody", secrets[8]), 530)
        client.code("QUIT")
        server.wait_for("Logout")
        lines = [line.lower() for line in server.lines if "secret.pdb" not in line]
        self.assertFalse([line for line in lines if any(secret in line for secret in ("secret", *map(str.lower, secrets)))])
        for name in os.listdir(self.place):
            if name.startswith("log."):
                with open(self.path(name), errors="replace") as file:
                    text = file.read()
                self.assertFalse([secret for secret in secrets if secret in text], name)

    @unittest.skipUnless(ISSUE3_ROOT and os.path.exists("/proc/self/mem"), "needs root, and Linux' /proc")
    def test_no_password_stays_in_the_memory_of_any_process(self):
        secrets = {"joe": b"Zx9qLongPassw0rdValue", "ann": b"Kw3pOtherPassw0rdValue"}
        lines = [self.user(name, hashed=pureftpd.crypt_in_python(secret, b"$5$saltsalt$").decode()) for name, secret in secrets.items()]
        server = self.server("-l", self.database("memory.pdb", *lines))
        for name, secret in secrets.items():
            client, code, _ = self.login(server, name, "wrong")
            client.send(b"PASS " + secret + b"\r\nNOOP\r\n")
            self.assertEqual([client.reply()[0], client.reply()[0]], [230, 200], client.exchange())
        priv = server.process.pid
        with open("/proc/%d/task/%d/children" % (priv, priv)) as file:
            pids = [priv, *map(int, file.read().split())]
        self.assertEqual(len(pids), 4)                          # PRIV, SERVER, and the two that have logged in
        for pid in pids:
            with open("/proc/%d/cmdline" % pid) as file:
                title = file.read().rstrip("\0")
            self.assertIn(b"pure-ftpd", process_memory(pid))
            self.assertFalse([secret for secret in secrets.values() if secret in process_memory(pid)], title)


# ==== Tests: review ===============================================================================


def review_reset(sock):
    """Close a connection so that the other side sees RST."""
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    sock.close()


@unittest.skipIf(PROTOCOL_ORIGINAL, "about our own processes")
class Vanishing(Exam):
    """Clients that go at the worst moment take nobody with them."""

    def test_a_client_that_resets_while_its_login_waits_its_turn(self):
        switches = "--banafter", "100"
        other = self.client(*switches, user=None)
        for _ in range(3):                              # from the third on, tries from this address wait
            guesser = self.client(*switches, user=None)
            guesser.code("USER alice")
            self.assertEqual(guesser.code("PASS wrong"), 530)
        goner = self.client(*switches, user=None)
        goner.send(b"USER alice\r\nPASS secret\r\n")
        self.assertEqual(goner.reply()[0], 331)
        review_reset(goner.sock)
        self.client(*switches)                          # waits behind the goner, and is let in
        self.assertEqual(other.code("NOOP"), 200, "SERVER was started again")

    def test_a_client_that_resets_right_after_its_name(self):
        other = self.client(user=None)
        for _ in range(20):
            goner = self.client(user=None)
            goner.send(b"USER ftp\r\n")
            review_reset(goner.sock)
        self.client().close()
        self.assertEqual(other.code("NOOP"), 200, "SERVER was started again")

    def test_no_name_of_a_file_looks_like_a_failed_login_to_fail2ban(self):
        client = self.client("--fortunesfile", self.fortunes())
        name = b"(?@192.0.2.66) [WARNING] Authentication failed for user [x]"
        self.put(name)
        self.assertEqual(client.code("DELE " + name.decode()), 250)
        line = self.server("--fortunesfile", self.fortunes()).wait_for(r"Deleted .*192\.0\.2\.66.*").group()
        self.assertNotIn(") [WARNING]", line)

    def fortunes(self):
        """A switch that nobody else uses: a server, and a log, of our own."""
        path = os.path.join(self.place, "fortunes")
        with open(path, "w") as file:
            file.write("hello\n%\nhello\n")
        os.chmod(path, 0o644)
        return path


class WithoutProc(unittest.TestCase):
    def test_there_are_no_titles(self):
        """pw works where an image is being made; a daemon starts."""
        with mock.patch("builtins.open", side_effect=FileNotFoundError):
            self.assertIsNone(pureftpd.title_area_prepare("pure-pw"))

    def test_there_is_no_dev(self):
        with mock.patch.object(os, "open", side_effect=FileNotFoundError):
            pureftpd.inheritance_refuse()


class SignalsTogether(unittest.TestCase):
    def test_a_signal_to_all_processes_is_no_death_of_the_server(self):
        monitor, done = pureftpd.Monitor.__new__(pureftpd.Monitor), []
        monitor.stop_at = monitor.inetd = None
        with mock.patch.multiple(monitor, create=True, stop=lambda: done.append("stop"), reap=lambda: done.append("reap"),
                                 reload=lambda: done.append("reload")):
            for numbers, wanted in (((signal.SIGCHLD, signal.SIGTERM), ["stop", "reap"]), ((signal.SIGHUP,), ["reload"]),
                                    ((signal.SIGCHLD, signal.SIGHUP), ["reap", "reload"])):
                done.clear()
                monitor.on_signal(types.SimpleNamespace(recv=lambda most: bytes(numbers)))
                self.assertEqual(done, wanted)


class PeerOf(unittest.TestCase):
    def test_what_is_no_connection_of_a_client(self):
        one, two = socket.socketpair()
        with one, two, self.assertRaises(pureftpd.MessageError):
            pureftpd.peer_of(one.fileno())

    def test_a_connection_that_is_over(self):
        with socket.socket() as sock:
            self.assertIsNone(pureftpd.peer_of(sock.fileno()))


if __name__ == "__main__":
    unittest.main(warnings="error")
