#!/bin/sh
# wput takes the session ticket of TLS 1.3 for the end of the connection, and so cannot use most servers of today.
#
# Seen with Debian 12's wput 0.6.2+git20130413-11 on libgnutls30 3.7.9-2+deb12u6. In TLS 1.3 a server sends session tickets
# after the handshake, so a client's next read meets them first. wput takes what that read gives it for an error
# ("read() failed ... errno: Success", "Connection broke down") though the reply to its USER is right behind.
# That the same wput goes on when the server sends no tickets (num_tickets = 0) shows that it is nothing else about TLS 1.3.
#
# What this prints: what wput says in its first connection, whose server answers USER with 331.
#     TLSv1.3, 2 tickets: AUTH USER
#     TLSv1.3, 0 tickets: AUTH USER PASS
# It ends with 1 if that has changed.
set -eu
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
cd "$work"
chmod 755 .
apt-get -q -o APT::Sandbox::User=root download wput=0.6.2+git20130413-11 > apt.log 2>&1 || { cat apt.log; exit 2; }
dpkg -x wput_*.deb .
openssl req -x509 -newkey rsa:2048 -nodes -subj /CN=localhost -days 2 -keyout key.pem -out cert.pem 2> openssl.log
: > file

cat > look.py <<'PYTHON'
import os, socket, ssl, subprocess, sys

def talk(tickets):
    """The TLS version, and the verbs of wput's first connection."""
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain("cert.pem", "key.pem")
    context.num_tickets = tickets
    with socket.create_server(("127.0.0.1", 0)) as listener:
        listener.settimeout(20)
        url = "ftp://joe:secret@127.0.0.1:%d/file" % listener.getsockname()[1]
        wput = subprocess.Popen(["usr/bin/wput", "--force-tls", "-t", "1", "file", url], stdin=subprocess.DEVNULL,
                                stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, env=dict(os.environ, HOME=os.getcwd()))
        try:
            plain, _ = listener.accept()
            plain.settimeout(20)
            plain.sendall(b"220 Ready\r\n")
            verbs = [plain.recv(1000).split()[0].decode()]
            plain.sendall(b"234 Go on\r\n")
            with context.wrap_socket(plain, server_side=True) as control:
                version = control.version()
                verbs += control.recv(1000).decode().split()[:1]
                control.sendall(b"331 Password\r\n")
                control.settimeout(5)                   # after its error wput waits 10 s before it tries again
                try:
                    verbs += control.recv(1000).decode().split()[:1]
                except OSError:
                    pass
        finally:
            wput.terminate()
            wput.wait(20)
    print("%s, %d tickets: %s" % (version, tickets, " ".join(verbs)))
    return version, verbs

sys.exit([talk(2), talk(0)] != [("TLSv1.3", ["AUTH", "USER"]), ("TLSv1.3", ["AUTH", "USER", "PASS"])])
PYTHON
timeout 90 python3 look.py
