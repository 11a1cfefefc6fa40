"""The pixels that a model sees of an image: compared with evaluation's arithmetic and with NumPy."""

import contextlib
import functools
import http.server
import io
import os
import re
import socket
import threading
import time
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
from PIL import Image

from vit_jax import images
from vit_jax.errors import ImageError
from vit_jax.images import fetch, image_files, open_image, other_files, read_image
from vit_jax.resampling import center_crop, resize

TOO_LARGE = r"has more than 89,478,485 pixels \(PIL.Image.MAX_IMAGE_PIXELS\): make it smaller, or raise the limit"


def encoded(image, kind="PNG", **options):
    file = io.BytesIO()
    image.save(file, kind, **options)
    return file.getvalue()


def seen(source, size=(64, 64)):
    """The pixels that are resized, uint8 [H, W, 3]."""
    return np.asarray(open_image(source, size, "it"))


def test_image_below_four_times_the_size_is_only_resized(noise):
    pixels = noise(4 * 32 - 1, 50)
    assert np.array_equal(read_image(encoded(Image.fromarray(pixels)), (32, 32), "it"), resize(pixels, (32, 32)))


def test_larger_image_is_averaged_in_blocks(noise):
    pixels = noise(6 * 32, 4 * 32 - 1)  # three rows become one, which leaves twice the height; the width stays
    means = pixels.reshape(64, 3, -1, 3).mean(axis=1)
    assert abs(seen(Image.fromarray(pixels), (32, 32)) - means).max() < 1


@pytest.mark.parametrize("side", [1024, 1000])
def test_fine_pattern_becomes_grey(side):
    board = np.indices((side, side)).sum(axis=0) % 2 * 255
    assert abs(read_image(board.astype(np.uint8), (32, 32), "it") - 127.5).max() <= 1


@pytest.mark.parametrize("shape", [(320, 4000), (4000, 320), (640, 640)])
def test_part_of_a_large_image_keeps_its_aspect_ratio_and_detail(noise, shape):
    """Reducing each side by its own factor would leave a few columns of a wide image."""
    pixels = np.asarray(Image.fromarray(noise(shape[0] // 25, shape[1] // 25)).resize(shape[::-1], Image.Resampling.BICUBIC))
    found = read_image(encoded(Image.fromarray(pixels)), (32, 32), "it", "center")
    apart = np.abs(found - center_crop(Image.fromarray(pixels), (32, 32)))  # averaging blocks first blurs a little
    assert apart.mean() < 3 and apart.max() < 15
    assert np.abs(found - read_image(pixels, (32, 32), "it")).max() > 30


def test_large_jpeg_is_decoded_at_a_fraction(monkeypatch):
    ramp = np.linspace(0, 255, 2048).astype(np.uint8)
    file = encoded(Image.fromarray(np.broadcast_to(ramp, (1536, 2048))), "JPEG", quality=95)
    drafted = []
    upright = images._to_rgb
    monkeypatch.setattr(images, "_to_rgb", lambda image, *rest: drafted.append(image.size) or upright(image, *rest))
    found = read_image(file, (64, 64), "it")
    assert drafted == [(256, 192)]
    np.testing.assert_allclose(found[32, :, 0], resize(ramp[None, :, None], (1, 64))[0, :, 0], atol=4)
    assert read_image(encoded(Image.new("RGB", (300, 200), "red"), "JPEG"), (64, 64), "it").shape == (64, 64, 3)


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("kind", ["PNG", "TIFF"])
def test_exif_orientation_is_applied(noise, orientation, kind):
    upright = noise(20, 30)
    stored = {
        1: upright,
        2: upright[:, ::-1],
        3: upright[::-1, ::-1],
        4: upright[::-1],
        5: upright.swapaxes(0, 1),
        6: np.rot90(upright),
        7: np.rot90(upright.swapaxes(0, 1), 2),
        8: np.rot90(upright, -1),
    }
    exif = Image.Exif()
    exif[0x0112] = orientation
    assert np.array_equal(seen(encoded(Image.fromarray(stored[orientation]), kind, exif=exif)), upright)


def test_damaged_exif_is_ignored(noise):
    pixels = noise()
    assert np.array_equal(seen(encoded(Image.fromarray(pixels), exif=b"Exif\0\0MM\0*\0\0\0\xff")), pixels)


def test_transparent_pixels_are_laid_on_white():
    colours = np.array([[[200, 0, 100, 0], [200, 0, 100, 51], [200, 0, 100, 255]]], np.uint8)
    expected = [[255, 255, 255], [244, 204, 224], [200, 0, 100]]
    grey = np.array([[[0, 0], [0, 51], [0, 255]]], np.uint8)
    for source in (colours, encoded(Image.fromarray(colours)), encoded(Image.fromarray(colours), "WEBP", lossless=True)):
        assert abs(seen(source)[0].astype(int) - expected).max() <= 1
    assert seen(encoded(Image.fromarray(grey)))[0, :, 0].tolist() == [255, 204, 0]
    palette = Image.fromarray(np.array([[0, 1]], np.uint8), "P")
    palette.putpalette([10, 20, 30, 40, 50, 60])
    assert seen(encoded(palette)).tolist() == [[[10, 20, 30], [40, 50, 60]]]
    assert seen(encoded(palette, transparency=1)).tolist() == [[[10, 20, 30], [255, 255, 255]]]


def test_every_kind_of_pixel_becomes_rgb(noise):
    pixels = noise()
    grey = pixels[..., 0]
    three = np.repeat(grey[..., None], 3, axis=-1)
    wide = (grey.astype(np.uint16) << 8) + pixels[..., 1]
    two, four = Image.fromarray(wide), Image.fromarray(wide.astype(np.int32))
    for source in (grey, grey[..., None], Image.fromarray(grey), encoded(two), encoded(two, "TIFF"), encoded(four, "TIFF")):
        assert np.array_equal(seen(source), three)
    assert np.array_equal(seen(encoded(Image.fromarray(grey > 127))), 255 * (three > 127))
    cmyk = seen(encoded(Image.new("CMYK", (8, 8), (0, 255, 255, 0)), "JPEG", quality=95)).astype(int)
    assert abs(cmyk - [255, 0, 0]).max() < 8
    film = [Image.new("RGB", (8, 8), colour) for colour in ("red", "blue")]
    assert (seen(encoded(film[0], "GIF", save_all=True, append_images=film[1:])) == [255, 0, 0]).all()


def saved(path, content):
    path.write_bytes(content)
    return path


@pytest.mark.parametrize(
    ("make", "said"),
    [
        (lambda folder: folder / "none.jpg", r"none\.jpg does not exist"),
        (lambda folder: folder, " is a folder without images"),
        (lambda folder: saved(folder / "a.png", b"").parent, r" is a folder of images: give its files, such as .*a\.png"),
        (
            lambda folder: saved(folder / "text.jpg", b"<html>"),
            r"text\.jpg is not an image in a supported format \(AVIF, BMP, GIF, JPEG",
        ),
        (
            lambda folder: saved(folder / "a.eps", encoded(Image.new("RGB", (8, 8)), "EPS")),
            r"a\.eps is not an image in a supported format",
        ),
        (
            lambda folder: saved(folder / "cut.jpg", encoded(Image.effect_noise((200, 200), 50), "JPEG")[:9000]),
            r"cut\.jpg cannot be read \(image file is truncated",
        ),
        (lambda folder: saved(folder / "huge.png", encoded(Image.new("1", (20_000, 20_000)))), rf"huge\.png {TOO_LARGE}"),
        # Pillow warns of this one but does not refuse it.
        (lambda folder: saved(folder / "large.png", encoded(Image.new("1", (10_000, 9_000)))), rf"large\.png {TOO_LARGE}"),
        (lambda folder: b"", " is empty"),
        (lambda folder: np.zeros((4, 4, 3), np.float32), "has pixels of type float32, expected uint8, from 0 to 255"),
        (lambda folder: np.zeros((3, 40, 40), np.uint8), r"has the shape \[3, 40, 40\], expected \[height, width\]"),
        (lambda folder: np.zeros((0, 4, 3), np.uint8), r"has the shape \[0, 4, 3\], expected"),
        (lambda folder: Image.new("F", (4, 4)), "has 32 bits per pixel, in an unknown range"),
    ],
)
def test_bad_image_is_an_error_in_one_line(tmp_path, make, said):
    source = make(tmp_path)
    with pytest.raises(ImageError, match=said) as caught:
        read_image(source, (32, 32), str(source) if isinstance(source, type(tmp_path)) else "this")
    assert "\n" not in str(caught.value)


def test_limit_of_pixels_is_that_of_pillow(monkeypatch):
    for limit, passes in ((63, False), (64, True), (None, True)):
        monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", limit)
        with contextlib.nullcontext() if passes else pytest.raises(ImageError, match="more than 63 pixels"):
            read_image(encoded(Image.new("L", (8, 8))), (32, 32), "it")


def test_image_of_one_pixel_fills_the_size():
    assert (read_image(encoded(Image.new("RGB", (1, 1), (1, 2, 3))), (32, 32), "it") == [1, 2, 3]).all()


def test_image_files_are_sorted_and_not_hidden(tmp_path):
    for name in ("b.JPG", "a.webp", "sub/c.png", "notes.txt", ".hidden.png", ".trash/d.png"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).touch()
    assert [str(path.relative_to(tmp_path)) for path in image_files(tmp_path)] == ["a.webp", "b.JPG", "sub/c.png"]
    assert list(image_files(tmp_path / "notes.txt")) == []


@pytest.mark.skipif(os.name == "nt", reason="links need a permission on Windows")
def test_linked_folders_are_followed_once(tmp_path):
    for name in ("photos/a.png", "elsewhere/b.png", "elsewhere/notes.txt"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).touch()
    (tmp_path / "photos" / "more").symlink_to(tmp_path / "elsewhere")
    (tmp_path / "elsewhere" / "back").symlink_to(tmp_path / "photos")
    names = [str(path.relative_to(tmp_path)) for path in image_files(tmp_path / "photos")]
    assert names == ["photos/a.png", "photos/more/b.png"]
    assert [path.name for path in other_files(tmp_path / "photos")] == ["notes.txt"]


@pytest.fixture(scope="module")
def server():
    red = encoded(Image.new("RGB", (8, 8), "red"))
    over = threading.Event()

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_GET(self):
            if self.path.startswith("/drip"):
                self.wfile.write(b"HTTP/1.0 200 OK\r\nX: " + (b"\r\n\r\n" if self.path == "/drip" else b""))
                with contextlib.suppress(OSError):
                    while not over.wait(0.02):
                        self.wfile.write(b"x")
                return
            kind = {"/page": "text/html; charset=utf-8"}.get(self.path, "application/octet-stream")
            self.send_response(404 if self.path == "/none" else 200)
            self.send_header("Content-Type", kind)
            self.send_header("Content-Length", str(len(red) + (self.path == "/cut")))
            self.end_headers()
            with contextlib.suppress(OSError):
                self.wfile.write(red)

        def log_message(self, *args):
            pass

    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler) as found:
        thread = threading.Thread(target=functools.partial(found.serve_forever, poll_interval=0.01))
        thread.start()
        yield f"http://127.0.0.1:{found.server_port}"
        over.set()
        found.shutdown()
        thread.join()


def test_image_at_an_address_is_downloaded(server):
    assert (read_image(f"{server}/red.png", (32, 32), "it") == [255, 0, 0]).all()


@pytest.mark.parametrize(
    ("path", "said"),
    [
        ("/page", r"/page is a page \(text/html\), not an image: give the address of the image on it"),
        ("/none", r"/none cannot be downloaded \(404 Not Found\)"),
        ("/cut", r"/cut cannot be downloaded \(.*\)"),
    ],
)
def test_address_without_an_image_is_an_error(server, path, said):
    with pytest.raises(ImageError, match=f"^{server}{said}$"):
        read_image(server + path, (32, 32), server + path)


@pytest.mark.parametrize("path", ["/drip", "/drip-headers"])
def test_download_from_a_slow_server_ends(server, monkeypatch, path):
    """The server sends a byte every 20 ms, without an end."""
    monkeypatch.setattr(images, "_DOWNLOAD_SECONDS", 0.5)
    with pytest.raises(ImageError, match=f"{server}{path} cannot be downloaded .(not complete|no answer) within 0.5 s"):
        fetch(server + path)


def test_downloads_are_bounded_and_name_the_address(server, monkeypatch):
    monkeypatch.setattr(images, "MAX_BYTES", 10)
    with pytest.raises(ImageError, match=r"red.png cannot be downloaded \([\d,]+ bytes, expected at most 10\)"):
        fetch(f"{server}/red.png")
    with socket.socket() as closed:
        closed.bind(("127.0.0.1", 0))
        address = f"http://127.0.0.1:{closed.getsockname()[1]}/x.png"
        with pytest.raises(ImageError, match=re.escape(f"{address} cannot be downloaded (Connection refused)")):
            fetch(address)
    with pytest.raises(ImageError, match="http:// cannot be downloaded"):
        fetch("http://")


def test_pipe_is_refused(tmp_path):
    os.mkfifo(tmp_path / "x.png")
    with pytest.raises(ImageError, match=r"x.png is not a regular file"):
        read_image(tmp_path / "x.png", (8, 8), str(tmp_path / "x.png"))


@pytest.mark.parametrize(("dtype", "name"), [(np.int32, "x.tif"), (np.uint16, "x.png"), (np.uint16, "x.tif")])
def test_16_bit_image_of_small_values_is_refused(tmp_path, dtype, name):
    """The higher bytes of its pixels are all 0."""
    Image.fromarray(np.full((8, 8), 200, dtype)).save(tmp_path / name)
    with pytest.raises(ImageError, match=f"^{name} has more than 8 bits per pixel and no value above 255"):
        read_image(tmp_path / name, (8, 8), name)


@pytest.mark.parametrize("suffix", ["webp", "avif", "png", "jpg"])
def test_large_images_are_decoded_on_one_thread(tmp_path, monkeypatch, suffix):
    """glibc's malloc keeps memory for the thread that freed it: WebP files decoded in turn on eight threads took 3.3 GiB."""
    Image.init()
    if suffix == "avif" and "AVIF" not in Image.OPEN:
        pytest.skip("this Pillow has no AVIF")
    path = tmp_path / f"x.{suffix}"
    Image.new("RGB", (64, 64)).save(path)
    monkeypatch.setattr(images, "_LARGE", 64 * 64 - 1)
    original, threads = images._to_rgb, []

    def recording(*args):
        threads.append(threading.get_ident())
        time.sleep(0.02)
        return original(*args)

    monkeypatch.setattr(images, "_to_rgb", recording)
    with ThreadPoolExecutor(4) as pool:
        list(pool.map(lambda source: read_image(source, (32, 32), "x"), 2 * [path, path.read_bytes()]))
    assert len(threads) == 4 and len(set(threads)) == 1
