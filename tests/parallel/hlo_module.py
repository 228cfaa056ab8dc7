"""Text of modules, written by hand."""


def module(lines, *, others="", header="num_partitions=8", parameter="f32[64]"):
    body = "\n".join(f"  {line}" for line in lines)
    return f"HloModule m, {header}\n\n{others}\nENTRY %main (p: {parameter}) -> f32[] {{\n{body}\n}}\n"


PARAMETER = "%p = f32[64]{0} parameter(0)"
