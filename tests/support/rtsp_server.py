"""A camera on loopback: an RTSP server (RFC 2326) for one client, H.264 over RTP interleaved with the connection."""

import socket
import threading
import time
from fractions import Fraction

import av
import numpy as np

RATE_HZ = 10
LONGEST_S = 60  # of a client that sees nothing
SDP = "\r\n".join(
    [
        *("v=0", "o=- 0 0 IN IP4 127.0.0.1", "s=camera", "c=IN IP4 0.0.0.0", "t=0 0", "m=video 0 RTP/AVP 96"),
        *("a=rtpmap:96 H264/90000", "a=fmtp:96 packetization-mode=1", "a=control:video", ""),
    ]
)


class _Interleaved:
    """What FFmpeg's RTP muxer writes, packet by packet, to a connection: RTP on channel 0, RTCP on channel 1."""

    def __init__(self, connection: socket.socket):
        self._connection = connection

    def write(self, data: bytes) -> int:
        packet = bytes(data)
        channel = 1 if 200 <= packet[1] <= 204 else 0
        self._connection.sendall(b"$" + bytes([channel]) + len(packet).to_bytes(2, "big") + packet)
        return len(packet)


def serve_one(listener: socket.socket, seconds: float, seen: threading.Event) -> tuple[list[str], float]:
    """Send one client a moving square in real time, and drop it.

    Args:
      listener: takes the client.
      seconds: how long to send after the client has seen something, however slow the machine is.
      seen: set by the caller when it has.

    Returns:
      The client's requests, and the length of what was sent in seconds.
    """
    connection, _ = listener.accept()
    with connection:
        return _until_play(connection), _send(connection, seconds, seen)


def _until_play(connection: socket.socket) -> list[str]:
    requests: list[str] = []
    buffer = b""
    while not requests or not requests[-1].startswith("PLAY"):
        while b"\r\n\r\n" not in buffer:
            data = connection.recv(4096)
            assert data, f"the client left after {requests}"
            buffer += data
        head, _, buffer = buffer.partition(b"\r\n\r\n")
        request = head.decode()
        requests.append(request)
        fields = {
            name.lower(): value for name, _, value in (line.partition(": ") for line in request.split("\r\n")[1:])
        }
        method = request.split(" ", 1)[0]
        status, extra, body = "200 OK", "Session: 7\r\n", ""
        if method == "OPTIONS":
            extra = "Public: OPTIONS, DESCRIBE, SETUP, PLAY, TEARDOWN\r\n"
        elif method == "DESCRIBE":
            extra, body = f"Content-Type: application/sdp\r\nContent-Length: {len(SDP)}\r\n", SDP
        elif method == "SETUP" and "TCP" in fields["transport"]:
            extra += "Transport: RTP/AVP/TCP;unicast;interleaved=0-1\r\n"
        elif method == "SETUP":
            status = "461 Unsupported Transport"
        connection.sendall(f"RTSP/1.0 {status}\r\nCSeq: {fields['cseq']}\r\n{extra}\r\n{body}".encode())
    return requests


def _send(connection: socket.socket, seconds: float, seen: threading.Event) -> float:
    start = time.monotonic()
    end = None
    with av.open(_Interleaved(connection), "w", format="rtp", options={"packetsize": "1400"}) as container:
        stream = container.add_stream("libx264", rate=RATE_HZ, options={"preset": "ultrafast", "tune": "zerolatency"})
        stream.width, stream.height, stream.pix_fmt, stream.gop_size = 64, 48, "yuv420p", RATE_HZ
        for i in range(LONGEST_S * RATE_HZ):
            if end is None and seen.is_set():
                end = time.monotonic() + seconds
            if end is not None and time.monotonic() > end:
                return i / RATE_HZ
            time.sleep(max(0.0, start + i / RATE_HZ - time.monotonic()))
            pixels = np.zeros((48, 64, 3), np.uint8)
            pixels[10:30, i % 40 : i % 40 + 20] = 200
            frame = av.VideoFrame.from_ndarray(pixels, format="rgb24")
            frame.pts, frame.time_base = i, Fraction(1, RATE_HZ)
            for packet in stream.encode(frame):
                container.mux(packet)
    return float(LONGEST_S)
