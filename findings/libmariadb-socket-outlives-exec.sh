#!/bin/sh
# A connection of libmariadb is inherited by every program that its owner executes; one of libpq is not.
#
# Seen with Debian 12's libmariadb3 1:10.11.19-0+deb12u1 (Connector/C 3.3) and libpq5 15.20-0+deb12u1 on Linux.
# Both are C libraries that open a socket on their caller's behalf. libpq sets FD_CLOEXEC on it, libmariadb does not,
# so a daemon that asks a database for an account and then executes a helper hands it that connection, too.
# The caller cannot ask for the flag: it has to find the number with mysql_get_socket() and set it itself, or
# close all that it does not know before it executes.
#
# What this prints:
#     libmariadb: inherited over exec
#     libpq: closed at exec
# It ends with 1 if either has changed.
set -eu
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
cd "$work"
chmod 755 .
for package in libmariadb3=1:10.11.19-0+deb12u1 libpq5=15.20-0+deb12u1; do
    apt-get -q -o APT::Sandbox::User=root download "$package" > apt.log 2>&1 || { cat apt.log; exit 2; }
done
for deb in *.deb; do dpkg -x "$deb" .; done

# The server accepts and says nothing, so each library is looked at while it waits for a greeting, in a thread.
cat > look.py <<'PYTHON'
import ctypes, fcntl, glob, os, socket, sys, threading

def own_end(peer):
    """The descriptor in this process whose address is `peer`."""
    for number in map(int, os.listdir("/proc/self/fd")):
        try:
            with socket.socket(fileno=os.dup(number)) as candidate:
                if candidate.family == socket.AF_INET and candidate.getsockname() == peer:
                    return number
        except OSError:
            pass

def look(name, connect):
    server = socket.create_server(("127.0.0.1", 0))
    port = server.getsockname()[1]
    thread = threading.Thread(target=connect, args=(port,))
    thread.start()
    connection, peer = server.accept()
    flags = fcntl.fcntl(own_end(peer), fcntl.F_GETFD)
    connection.close()
    thread.join(20)
    kept = not flags & fcntl.FD_CLOEXEC
    print(name + ": " + ("inherited over exec" if kept else "closed at exec"))
    return kept

maria = ctypes.CDLL(glob.glob("usr/lib/*/libmariadb.so.3")[0])
maria.mysql_init.restype = ctypes.c_void_p
maria.mysql_real_connect.argtypes = ([ctypes.c_void_p] + 4 * [ctypes.c_char_p] +
                                     [ctypes.c_uint, ctypes.c_char_p, ctypes.c_ulong])
maria.mysql_close.argtypes = [ctypes.c_void_p]
libpq = ctypes.CDLL(glob.glob("usr/lib/*/libpq.so.5")[0])
libpq.PQconnectdb.restype = ctypes.c_void_p
libpq.PQfinish.argtypes = [ctypes.c_void_p]

def by_mariadb(port):
    handle = maria.mysql_init(None)
    maria.mysql_real_connect(handle, b"127.0.0.1", b"joe", b"secret", b"ftp", port, None, 0)
    maria.mysql_close(handle)

def by_libpq(port):
    libpq.PQfinish(libpq.PQconnectdb(b"host=127.0.0.1 user=joe dbname=ftp sslmode=disable gssencmode=disable port=%d" % port))

found = [look("libmariadb", by_mariadb), look("libpq", by_libpq)]
sys.exit(found != [True, False])
PYTHON
timeout 60 python3 look.py
