"""Pictures of the methods' formulas, one SVG each, in light and in dark; written by ``make golden``."""

from collections.abc import Callable, Sequence
from pathlib import Path
from xml.sax.saxutils import escape

DIRECTORY = Path(__file__).parents[2] / "docs" / "images" / "methods"
WIDTH = 660
_STYLE = """
  text { font: 14px system-ui, sans-serif; fill: #263238; text-anchor: middle }
  .small { font-size: 12px; fill: #546e7a }
  .left { text-anchor: start }
  .paper { fill: #fff }
  .frozen { fill: #eceff1; stroke: #90a4ae }
  .line { fill: none; stroke: #607d8b; stroke-width: 1.4 }
  .dashed { fill: none; stroke: #90a4ae; stroke-width: 1.2; stroke-dasharray: 5 4 }
  .head { fill: #607d8b }
  .trained { fill: #1565c0; stroke: #1565c0 }
  .on { fill: #fff }
  @media (prefers-color-scheme: dark) {
    text { fill: #eceff1 } .small { fill: #b0bec5 } .paper { fill: #1e2129 } .frozen { fill: #37474f; stroke: #78909c }
    .line { stroke: #90a4ae } .head { fill: #90a4ae } .dashed { stroke: #78909c }
    .trained { fill: #64b5f6; stroke: #64b5f6 } .on { fill: #10202e }
  }
"""


class Picture:
    """Shapes on a sheet; grey ones stand for what is frozen, coloured ones for what is trained."""

    def __init__(self, title: str, height: int) -> None:
        self.title, self.height, self.shapes = title, height, list[str]()

    def text(self, x: float, y: float, words: str, kind: str = "") -> None:
        """Write words around ``x``, on the line ``y``."""
        self.shapes.append(f'<text class="{kind}" x="{x}" y="{y}">{escape(words)}</text>')

    def box(self, x: float, y: float, w: float, h: float, words: str, trained: bool = False) -> None:
        """Draw a box around its middle ``x``, ``y``."""
        kind = "trained" if trained else "frozen"
        self.shapes.append(f'<rect class="{kind}" x="{x - w / 2}" y="{y - h / 2}" width="{w}" height="{h}" rx="4"/>')
        self.text(x, y + 5, words, "on" if trained else "")

    def funnel(self, x: float, y: float, words: str, narrows: bool, h: float = 60, w: float = 62) -> None:
        """Draw a trained matrix that makes its input narrow, or wide again."""
        left, right = (h, h * 0.5) if narrows else (h * 0.5, h)
        self.shapes.append(
            f'<path class="trained" d="M{x - w / 2} {y - left / 2}V{y + left / 2}'
            f'L{x + w / 2} {y + right / 2}V{y - right / 2}Z"/>'
        )
        self.text(x, y + 5, words, "on")

    def arrow(self, *points: tuple[float, float], dashed: bool = False) -> None:
        """Draw a line through points, with a head at the last, which is reached from the left, above or below."""
        (x0, y0), (x, y) = points[-2:]
        path = "M" + "L".join(f"{a} {b}" for a, b in points)
        self.shapes.append(f'<path class="{"dashed" if dashed else "line"}" d="{path}"/>')
        back, side = ((-7 if x > x0 else 7), 0) if x != x0 else (0, (-7 if y > y0 else 7))
        across = (0, 4) if back else (4, 0)
        first, second = ((x + back + s * across[0], y + side + s * across[1]) for s in (1, -1))
        self.shapes.append(f'<path class="head" d="M{x} {y}L{first[0]} {first[1]}L{second[0]} {second[1]}Z"/>')

    def node(self, x: float, y: float, sign: str) -> None:
        """Draw a circle with what it does to its inputs."""
        self.shapes.append(f'<circle class="paper line" cx="{x}" cy="{y}" r="12"/>')
        self.text(x, y + 5, sign)

    def cells(self, x: float, y: float, kinds: Sequence[bool]) -> None:
        """Draw a row of vectors, each trained or not, from ``x`` on."""
        for i, trained in enumerate(kinds):
            kind = "trained" if trained else "frozen"
            self.shapes.append(f'<rect class="{kind}" x="{x + 26 * i}" y="{y - 28}" width="20" height="56" rx="3"/>')

    def svg(self) -> str:
        """Return the whole file."""
        self.text(14, self.height - 10, "grey: frozen, coloured: trained", "small left")
        head = (
            f'<svg xmlns="http://www.w3.org/2000/svg" width="{WIDTH}" height="{self.height}" '
            f'viewBox="0 0 {WIDTH} {self.height}" role="img">\n<title>{escape(self.title)}</title>\n'
            f'<style>{_STYLE}</style>\n<rect class="paper" width="{WIDTH}" height="{self.height}" rx="6"/>\n'
        )
        return head + "\n".join(self.shapes) + "\n</svg>\n"


def lora() -> Picture:
    """Return a linear with a pair of factors beside it."""
    p = Picture("y = W x + b + s B A x: the product of two small matrices beside a frozen linear", 224)
    beside_a_linear(p, 500)
    p.text(620, 98, "y")
    p.arrow((512, 92), (608, 92))
    return p


def beside_a_linear(p: Picture, end: float) -> None:
    """Draw x, W and the pair A, B, whose outputs meet at ``end``."""
    p.text(30, 98, "x")
    p.arrow((42, 92), (70, 92), (70, 50), (190, 50))
    p.arrow((70, 92), (70, 140), (150, 140))
    p.box(250, 50, 120, 46, "W x + b")
    p.funnel(181, 140, "A", True)
    p.text(181, 186, "r × in", "small")
    p.arrow((212, 140), (282, 140))
    p.text(247, 132, "r values", "small")
    p.funnel(313, 140, "B", False)
    p.text(313, 186, "out × r", "small")
    p.arrow((344, 140), (392, 140))
    p.node(404, 140, "s")
    p.text(404, 176, "s = α / r", "small")
    p.arrow((416, 140), (end, 140), (end, 104))
    p.arrow((310, 50), (end, 50), (end, 80))
    p.node(end, 92, "+")


def dora() -> Picture:
    """Return LoRA's picture with what scales the rows behind it."""
    p = Picture("y = m / |W + sBA| (W + sBA) x + b: LoRA, then every row brought to a length of its own", 224)
    beside_a_linear(p, 450)
    p.box(250, 50, 120, 46, "W x")
    p.arrow((462, 92), (528, 92))
    p.node(540, 92, "⊙")
    p.box(540, 34, 40, 34, "m", trained=True)
    p.text(604, 39, "/ ‖W + sBA‖", "small")
    p.arrow((540, 51), (540, 80))
    p.arrow((552, 92), (596, 92))
    p.text(628, 98, "+ b = y")
    return p


def canonical_lora() -> Picture:
    """Return a fused linear with a pair for each of its parts."""
    p = Picture("a pair of factors for each of q, k and v, added to its own rows of the fused linear", 250)
    p.text(30, 125, "x")
    p.box(190, 38, 180, 40, "linear_qkv")
    p.arrow((42, 120), (64, 120), (64, 38), (100, 38))
    for i, name in enumerate(("q", "k", "v")):
        y = 92 + 52 * i
        meet = 440 + 44 * i
        p.arrow((64, 120), (64, y), (144, y))
        p.funnel(172, y, f"A {name}", True, 44, 56)
        p.arrow((200, y), (252, y))
        p.funnel(280, y, f"B {name}", False, 44, 56)
        p.arrow((308, y), (meet - 12, y))
        p.arrow((280, 28 + 10 * i), (meet, 28 + 10 * i), (meet, y - 12))
        p.node(meet, y, "+")
        p.arrow((meet + 12, y), (606, y))
        p.text(622, y + 5, name)
    return p


def canonical_adapter() -> Picture:
    """Return the bottleneck behind a sub-layer."""
    p = Picture("h' = h + W_out act(W_in LN(h)), behind attention or MLP and before the residual is added", 205)
    p.text(24, 76, "x")
    p.arrow((34, 70), (70, 70))
    p.box(126, 70, 112, 46, "attention, MLP")
    p.arrow((182, 70), (536, 70))
    p.text(206, 60, "h")
    p.arrow((216, 70), (216, 140), (238, 140))
    p.box(262, 140, 48, 40, "LN", trained=True)
    p.arrow((286, 140), (310, 140))
    p.funnel(344, 140, "W in", True, 60, 68)
    p.arrow((378, 140), (400, 140))
    p.box(424, 140, 48, 34, "act")
    p.arrow((448, 140), (466, 140))
    p.funnel(500, 140, "W out", False, 60, 68)
    p.arrow((534, 140), (548, 140), (548, 82))
    p.node(548, 70, "+")
    p.arrow((560, 70), (592, 70))
    p.text(577, 60, "h'")
    p.node(604, 70, "+")
    p.arrow((44, 70), (44, 24), (604, 24), (604, 58))
    p.text(324, 18, "residual", "small")
    p.arrow((616, 70), (648, 70))
    p.arrow((44, 70), (44, 140), (216, 140), dashed=True)
    p.text(130, 158, "parallel=True: x instead of h", "small")
    return p


def ia3() -> Picture:
    """Return the vectors on keys, values and hidden values."""
    p = Picture("k' = l_k ⊙ k, v' = l_v ⊙ v, a' = l_ff ⊙ a: vectors that scale what the frozen layer computes", 264)
    p.text(24, 92, "x")
    p.arrow((34, 86), (64, 86))
    p.box(118, 86, 108, 150, "linear_qkv")
    p.box(414, 86, 84, 150, "attention")
    p.arrow((172, 36), (372, 36))
    p.text(192, 30, "q")
    for y, name in ((86, "k"), (136, "v")):
        p.text(192, y - 6, name)
        p.arrow((172, y), (262, y))
        p.node(274, y, "⊙")
        p.arrow((286, y), (372, y))
        p.text(340, y - 6, f"{name}'")
    p.box(240, 61, 40, 24, "l k", trained=True)
    p.arrow((260, 61), (274, 61), (274, 74))
    p.box(240, 111, 40, 24, "l v", trained=True)
    p.arrow((260, 111), (274, 111), (274, 124))
    p.arrow((456, 86), (498, 86))
    p.box(550, 86, 104, 40, "linear_proj")
    p.arrow((550, 106), (550, 196), (520, 196))
    p.box(474, 196, 92, 36, "linear_fc1")
    p.arrow((428, 196), (402, 196))
    p.box(377, 196, 50, 34, "act")
    p.arrow((352, 196), (310, 196))
    p.text(334, 188, "a")
    p.node(298, 196, "⊙")
    p.box(298, 240, 44, 24, "l ff", trained=True)
    p.arrow((298, 228), (298, 208))
    p.arrow((286, 196), (246, 196))
    p.text(264, 188, "a'")
    p.box(200, 196, 92, 36, "linear_fc2")
    return p


def in_front(p: Picture) -> None:
    """Draw the rows that virtual tokens stand in front of, and the model behind them."""
    p.cells(330, 84, [True] * 4 + [False] * 5)
    p.text(380, 42, "P", "")
    p.text(492, 42, "x", "")
    p.text(380, 134, "v virtual tokens", "small")
    p.text(492, 134, "the input's words", "small")
    p.arrow((562, 84), (580, 84))
    p.box(616, 84, 70, 60, "base")
    p.box(160, 176, 170, 36, "word_embeddings")
    p.arrow((245, 176), (492, 176), (492, 142))
    p.text(36, 181, "ids")
    p.arrow((52, 176), (75, 176))


def ptuning() -> Picture:
    """Return the encoder that makes the virtual rows."""
    p = Picture("[P; x] with P = MLP(E) or MLP(LSTM(E)): an encoder makes the rows in front of the input", 230)
    p.cells(30, 84, [True] * 4)
    p.text(80, 42, "E")
    p.text(80, 134, "v slots of width e", "small")
    p.arrow((136, 84), (164, 84))
    p.box(232, 84, 136, 46, "MLP or LSTM", trained=True)
    p.arrow((300, 84), (326, 84))
    in_front(p)
    return p


def prompt_tuning() -> Picture:
    """Return the table that is trained itself."""
    p = Picture("[P; x]: rows in front of the input that are trained themselves", 230)
    p.arrow((160, 158), (160, 84), (326, 84), dashed=True)
    p.text(244, 76, "first values: of words", "small")
    in_front(p)
    return p


def selective() -> Picture:
    """Return a layer whose biases and norms are trained."""
    p = Picture("tensors of the base itself are trained in place: here biases and norms", 160)
    p.text(24, 76, "x")
    p.arrow((34, 70), (60, 70))
    x = 60
    for words, width, trained in (
        ("norm γ", 76, True), ("W qkv", 76, False), ("b", 30, True), ("attention", 90, False), ("W proj", 70, False),
        ("b", 30, True),
    ):  # fmt: skip
        p.box(x + width / 2, 70, width, 46, words, trained)
        x += width
        if words != "b" or x < 420:
            p.arrow((x, 70), (x + 22, 70))
            x += 22
    p.arrow((x, 70), (584, 70))
    p.node(596, 70, "+")
    p.arrow((46, 70), (46, 26), (596, 26), (596, 58))
    p.text(320, 20, "residual", "small")
    p.arrow((608, 70), (644, 70))
    p.text(270, 118, 'patterns=["bias", "norm"]', "small")
    return p


DRAWINGS: dict[str, Callable[[], Picture]] = {
    drawing.__name__.replace("_", "-"): drawing
    for drawing in (lora, dora, canonical_lora, canonical_adapter, ia3, ptuning, prompt_tuning, selective)
}
"""Every picture by the name of its file."""


def file_of(name: str) -> Path:
    """Return the file that holds picture ``name``."""
    return DIRECTORY / f"{name}.svg"
