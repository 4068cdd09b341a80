#!/bin/sh
# libmariadb reads every certificate authority that the system trusts, for a connection that verifies nothing.
#
# Seen with Debian 12's libmariadb3 1:10.11.19-0+deb12u1 (Connector/C 3.3), libssl3 3.0.22-1~deb12u2, on Linux. A program that
# asks for TLS (MYSQL_OPT_SSL_ENFORCE) and not for verification gets OpenSSL's default list loaded all the same, before each
# connection: with the 140 authorities of ca-certificates that was 22 of the 37 ms of CPU that a small daemon spent on such a
# connection and its queries. With a file of one's own (MYSQL_OPT_SSL_CA) the list is left alone. Who verifies nothing and has
# no such file can have the variable SSL_CERT_FILE, which OpenSSL heeds, name an empty one.
#
# What this prints (the list is a file of this script's, and the kernel tells when it is opened):
#     no TLS: 0
#     TLS, verifying nothing: 1
#     TLS, a file of its own: 0
# It ends with 1 if that has changed.
set -eu
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
cd "$work"
for package in libmariadb3=1:10.11.19-0+deb12u1 libssl3=3.0.22-1~deb12u2; do
    apt-get -q -o APT::Sandbox::User=root download "$package" > apt.log 2>&1 || { cat apt.log; exit 2; }
done
for deb in *.deb; do dpkg -x "$deb" .; done
libraries=$(echo "$work"/usr/lib/*-linux-gnu)

# One valid certificate for the list. The server offers TLS in its greeting and hangs up at the request for it: by then the
# library has prepared its side.
openssl req -x509 -newkey ec -pkeyopt ec_paramgen_curve:prime256v1 -nodes -days 3 -subj /CN=authority -keyout key -out list 2> ssl.log
cp list own
cat > look.py <<'PYTHON'
import ctypes, os, socket, struct, sys, threading

CAPABILITIES = 0x00000200 | 0x00000800 | 0x00008000 | 0x00080000       # protocol 4.1, TLS, long scrambles, plugins
GREETING = (b"\x0a8.0.0\0" + struct.pack("<I", 7) + b"12345678\0" + struct.pack("<HBHH", CAPABILITIES & 0xffff, 45, 2,
            CAPABILITIES >> 16) + b"\x15" + bytes(10) + b"901234567890\0" + b"mysql_native_password\0")
ENFORCE, CA = 38, 27

def serve(server):
    connection = server.accept()[0]
    with connection:
        connection.sendall(struct.pack("<I", len(GREETING))[:3] + b"\0" + GREETING)
        connection.recv(4096)

def opened(*options):
    """How often the list is opened while libmariadb connects."""
    libc, inotify = ctypes.CDLL(None), None
    inotify = libc.inotify_init1(os.O_NONBLOCK)
    assert libc.inotify_add_watch(inotify, b"list", 0x20) >= 0          # IN_OPEN
    server = socket.create_server(("127.0.0.1", 0))
    threading.Thread(target=serve, args=(server,), daemon=True).start()
    handle = maria.mysql_init(None)
    for option in options:
        assert maria.mysql_options(handle, *option) == 0
    maria.mysql_real_connect(handle, b"127.0.0.1", b"joe", b"secret", None, server.getsockname()[1], None, 0)
    maria.mysql_close(handle)
    try:
        return len(os.read(inotify, 4096)) // 16
    except BlockingIOError:
        return 0

maria = ctypes.CDLL("libmariadb.so.3")
maria.mysql_init.restype = ctypes.c_void_p
maria.mysql_close.argtypes = [ctypes.c_void_p]
maria.mysql_options.argtypes = [ctypes.c_void_p, ctypes.c_int, ctypes.c_void_p]
maria.mysql_real_connect.argtypes = ([ctypes.c_void_p] + 4 * [ctypes.c_char_p] +
                                     [ctypes.c_uint, ctypes.c_char_p, ctypes.c_ulong])
yes = (ENFORCE, ctypes.byref(ctypes.c_byte(1)))
print("no TLS:", opened())
print("TLS, verifying nothing:", opened(yes))
print("TLS, a file of its own:", opened(yes, (CA, ctypes.c_char_p(b"own"))))
PYTHON
LD_LIBRARY_PATH="$libraries" SSL_CERT_FILE="$work/list" SSL_CERT_DIR="$work" timeout 60 python3 look.py > seen
cat seen
cat > wanted <<'TEXT'
no TLS: 0
TLS, verifying nothing: 1
TLS, a file of its own: 0
TEXT
cmp seen wanted
