"""One end of Mooncake's transfer engine over TCP, with the lines of wire/end.rs: ROLE CELL_BYTES CELLS BYTES [PEER]."""
import ctypes
import mmap
import sys
import time

from mooncake.engine import TransferEngine

MASK = (1 << 64) - 1


def words_of(slot, count):
    word, out = slot, bytearray()
    for _ in range(count):
        out += word.to_bytes(8, "little")
        word = (word * 0x5851F42D4C957F2D + 0x14057B7EF767814F) & MASK
    return out


role, cell_bytes, cells, size = sys.argv[1], *map(int, sys.argv[2:5])
memory = mmap.mmap(-1, cell_bytes * cells)
base = ctypes.addressof(ctypes.c_char.from_buffer(memory))
engine = TransferEngine()
assert engine.initialize("127.0.0.1", "P2PHANDSHAKE", "tcp", "") == 0
assert engine.register_memory(base, len(memory)) == 0
turns = -(-size // len(memory))
# The head of each cell is enough to see that cells arrive, and each in its place.
HEAD_WORDS = 64

if role == "decode":
    memory[:] = bytes(len(memory))
    print(f"ready 127.0.0.1:{engine.get_rpc_port()},{base}", flush=True)
    for number, line in enumerate(iter(sys.stdin.readline, "")):
        if number == 0:
            # A write that has returned is not always in the other memory yet.
            deadline = time.monotonic() + 10
            for slot in range(cells):
                head = words_of(slot, HEAD_WORDS)
                while memory[slot * cell_bytes:slot * cell_bytes + len(head)] != head:
                    assert time.monotonic() < deadline, f"cell {slot} is another than was sent"
                    time.sleep(0.001)
        print("done 0", flush=True)
else:
    peer, there = sys.argv[5].split(",")
    for slot in range(cells):
        memory[slot * cell_bytes:slot * cell_bytes + 8 * HEAD_WORDS] = bytes(words_of(slot, HEAD_WORDS))
    offsets = [slot * cell_bytes for slot in range(cells)]
    sources, targets = [base + at for at in offsets], [int(there) + at for at in offsets]
    print("ready", flush=True)
    for line in iter(sys.stdin.readline, ""):
        begin = time.monotonic()
        for _ in range(turns):
            assert engine.batch_transfer_sync_write(peer, sources, targets, [cell_bytes] * cells) == 0
        print(f"done {turns * len(memory)} {time.monotonic() - begin} 0", flush=True)
