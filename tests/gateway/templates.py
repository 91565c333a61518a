"""Strategies for path templates and paths, and matching written down as plainly as can be."""

from __future__ import annotations

from hypothesis import strategies as st

from gateway.path_template import PathTemplate, Segment, Variable, Wildcard

LITERALS = st.sampled_from(["a", "b", "a.b", "v1", "x-y~z", "$", "(a)", "%2F", "a+b"])
PATH_SEGMENTS = st.sampled_from(["a", "b", "a.b", "axb", "v1", "$", "(a)", "a:go", ":go", "", "%2F", "ü"])
PATHS = st.builds(
    lambda parts, verb: "/" + "/".join(parts) + verb,
    st.lists(PATH_SEGMENTS, max_size=5),
    st.sampled_from(["", ":go", ":b.c"]),
)


@st.composite
def templates(draw: st.DrawFn, *, plain_variables: bool = False) -> PathTemplate:
    """Any template; with literals in variables that Kong understands, if asked for."""
    segments: list[Segment] = draw(st.lists(LITERALS | st.just(Wildcard.ONE), max_size=4))
    if not segments or draw(st.booleans()):
        last: st.SearchStrategy[Segment] = st.sampled_from(["a", *Wildcard])
        segments.append(draw(last))
    cuts = sorted(draw(st.sets(st.integers(0, len(segments)), max_size=4)))
    variables = []
    for number, (start, end) in enumerate(zip(cuts[::2], cuts[1::2], strict=False)):
        if plain_variables:
            segments[start:end] = [s if isinstance(s, Wildcard) else "a" for s in segments[start:end]]
        path = (f"f{number}",) if plain_variables else draw(st.sampled_from([(f"f{number}",), ("m", f"_f{number}")]))
        variables.append(Variable(path, start, end))
    return PathTemplate(tuple(segments), tuple(variables), draw(st.sampled_from(["", "go", "b.c"])))


def naive_match(template: PathTemplate, path: str) -> dict[str, str] | None:
    """Tries every number of segments that ``**`` can stand for."""
    if template.verb:
        suffix = f":{template.verb}"
        if not path.endswith(suffix):
            return None
        path = path[: len(path) - len(suffix)]
    if not path.startswith("/"):
        return None
    parts = [] if path == "/" else path[1:].split("/")
    for count in range(len(parts) + 1):
        wanted: list[Segment] = []
        owners: list[int] = []
        for index, segment in enumerate(template.segments):
            copies = count if segment is Wildcard.MANY else 1
            wanted += copies * [segment]
            owners += copies * [index]
        if len(wanted) == len(parts) and all(
            part != "" and (isinstance(want, Wildcard) or want == part)
            for want, part in zip(wanted, parts, strict=True)
        ):
            return {
                variable.name: "/".join(
                    part for part, owner in zip(parts, owners, strict=True) if variable.start <= owner < variable.end
                )
                for variable in template.variables
            }
    return None
