"""The compiled extension's signatures; built from native/src/bindings.cpp, missing without a C++ compiler."""

INTERFACE: int

def cpu_name() -> str: ...
def cpu_features() -> dict[str, bool]: ...
def interpret_x86(
    *,
    leaf1_ecx: int = 0,
    leaf7_ebx: int = 0,
    leaf7_ecx: int = 0,
    leaf7_edx: int = 0,
    leaf7_1_eax: int = 0,
    tile_palette_ebx: int = 0,
    tile_palette_ecx: int = 0,
    xcr0: int = 0,
    tile_permission: bool = False,
) -> dict[str, bool]: ...
