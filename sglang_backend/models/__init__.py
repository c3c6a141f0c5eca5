"""The model classes that SGLang builds in place of its own, in the form that its registry reads: modules with an
`EntryClass`.

Both are imported here. SGLang only warns of a module that cannot be imported, and would then serve its own class; a
package that cannot be imported stops it.
"""

from dsv3_plugin.sglang_backend.models import deepseek_nextn, deepseek_v3

__all__ = ["deepseek_nextn", "deepseek_v3"]
