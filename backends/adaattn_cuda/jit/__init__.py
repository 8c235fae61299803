"""From a KernelSpec to machine code: text, compiler, cache. Knows no kernel and no device."""
