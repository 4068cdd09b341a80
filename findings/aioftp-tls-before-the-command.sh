#!/bin/sh
# aioftp begins TLS on a data connection, and waits for the end of that handshake, before it says what the connection is for.
#
# Seen with aioftp 0.28.3 of PyPI. Other clients connect, say RETR or STOR, and only then begin the handshake of the data
# connection, many of them when 150 has come; Python's own ftplib below is one. A server may therefore take up a passive
# connection when a command for it is there: not before does it know what there is to send, or that it says 550 and needs no
# TLS. From such a server aioftp gets no ServerHello, and the server gets no command from aioftp: no transfer comes about.
# A server for both has to watch the control connection and the passive one at once, and shake hands with whoever begins.
#
# The server below does that. It looks at what comes first after EPSV or PASV, and, if that is on the data connection, whether
# a command has come a second later.
#
# What this prints:
#     ftplib: the command, then TLS; 5 bytes fetched
#     aioftp: TLS, and no command within a second; 5 bytes fetched
# It ends with 1 if that has changed.
set -eu
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
cd "$work"
python3 -m venv venv
venv/bin/pip -q --disable-pip-version-check install aioftp==0.28.3
openssl req -x509 -newkey rsa:2048 -nodes -subj /CN=localhost -addext subjectAltName=IP:127.0.0.1 -days 2 \
    -keyout key.pem -out cert.pem 2> openssl.log

cat > look.py <<'PYTHON'
import asyncio, contextlib, ftplib, select, socket, ssl, sys, threading

import aioftp

server_context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
server_context.load_cert_chain("cert.pem", "key.pem")

def readable(*connections, seconds):
    return select.select(connections, [], [], seconds)[0]

def session(plain, seen):
    plain.settimeout(20)
    plain.sendall(b"220 Ready\r\n")
    assert plain.recv(1000).upper().startswith(b"AUTH TLS")
    plain.sendall(b"234 Go on\r\n")
    with server_context.wrap_socket(plain, server_side=True) as control, control.makefile("r", newline="\r\n") as lines, \
            socket.create_server(("127.0.0.1", 0)) as passive:
        def reply(text):
            control.sendall(text.encode() + b"\r\n")
        port = passive.getsockname()[1]
        replies = {"USER": "331 Password", "PASS": "230 Welcome", "PWD": '257 "/"', "QUIT": "221 Bye",
                   "EPSV": "229 Extended (|||%d|)" % port, "PASV": "227 Entering (127,0,0,1,%d,%d)" % divmod(port, 256)}
        for line in lines:
            verb = line.split()[0].upper()
            if verb != "RETR":
                reply(replies.get(verb, "200 Done"))
            if verb in ("EPSV", "PASV"):
                passive.settimeout(20)
                data, _ = passive.accept()
                data.settimeout(20)
                first = readable(control, data, seconds=10)
                if first == [data]:
                    begins = data.recv(1, socket.MSG_PEEK) == b"\x16"           # a record of a handshake
                    command = "then a command" if readable(control, seconds=1) else "and no command within a second"
                    seen.append(("TLS, " if begins else "data, ") + command)
                    data = server_context.wrap_socket(data, server_side=True)
                else:
                    seen.append("the command, then TLS" if first == [control] else "both, or nothing")
            elif verb == "RETR":
                reply("150 Go on")
                if not isinstance(data, ssl.SSLSocket):
                    data = server_context.wrap_socket(data, server_side=True)
                with data:
                    data.sendall(b"hello")
                    with contextlib.suppress(OSError):
                        data = data.unwrap()
                data.close()
                reply("226 Done")
            elif verb == "QUIT":
                return

def by_ftplib(port, context):
    came = []
    with ftplib.FTP_TLS(context=context, timeout=20) as client:
        client.connect("127.0.0.1", port)
        client.login("joe", "secret")
        client.prot_p()
        client.retrbinary("RETR file", came.append)
    return b"".join(came)

def by_aioftp(port, context):
    async def fetch():
        client = aioftp.Client(socket_timeout=20)
        await client.connect("127.0.0.1", port)
        await client.upgrade_to_tls(context)
        await client.login("joe", "secret")
        async with client.download_stream("file") as stream:
            came = await stream.read()
        await client.quit()
        return came
    return asyncio.run(asyncio.wait_for(fetch(), 30))

def look(name, fetch):
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    context.load_verify_locations("cert.pem")
    seen = []
    with socket.create_server(("127.0.0.1", 0)) as listener:
        thread = threading.Thread(target=lambda: session(listener.accept()[0], seen), daemon=True)
        thread.start()
        came = fetch(listener.getsockname()[1], context)
        thread.join(20)
    print("%s: %s; %d bytes fetched" % (name, "; ".join(seen), len(came)))
    return seen, came

found = [look("ftplib", by_ftplib), look("aioftp", by_aioftp)]
sys.exit(found != [(["the command, then TLS"], b"hello"), (["TLS, and no command within a second"], b"hello")])
PYTHON
timeout 90 venv/bin/python look.py
