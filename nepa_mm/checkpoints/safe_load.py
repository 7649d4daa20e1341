"""Read files of ``torch.save`` as tensors and plain values, without calling anything in them.

``torch.load(weights_only=True)`` allows a pickle to call a list of names. Some of these call their
arguments, or allocate as much memory as the file requests. mmengine adds ``getattr``. torch before
2.6 executes TorchScript and trusts every size. Here a name in a pickle becomes a :class:`Name`,
which cannot be called. ``VALUES`` alone defines what a name and its arguments may become, for all
versions of torch, mmengine and numpy:

========================================  ========================================================
name                                      result, and why it is harmless
========================================  ========================================================
torch._utils._rebuild_tensor, _v2, _v3    a view within the bytes of its own entry of the file
torch._utils._rebuild_parameter           its argument, a tensor
torch.FloatStorage and similar            no object; names the dtype of an entry
torch.float32 and similar                 a dtype
torch.Size, torch.device                  integers; a device name
_codecs.encode                            the bytes of a latin-1 text, of the same length
OrderedDict, Counter, set, slice          plain values; keys are strings and small integers
numpy dtype, ndarray, scalar              fixed-width numbers whose bytes are in the file
HistoryBuffer                             a log record of two such arrays
getattr                                   None, for statistics of HistoryBuffer, which it defines
========================================  ========================================================

Classes that the user allowed by ``torch.serialization.add_safe_globals`` are built as well.
"""
import pickle
import zipfile
from collections import Counter, OrderedDict
from collections.abc import Callable
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import torch
from mmengine.logging import HistoryBuffer

MAX_DEPTH = 50      # of nested containers
CHUNK = 1 << 24     # bytes read at a time
MAGIC = 0x1950a86a20f9469cfc6c      # first pickle in files of torch before 1.6
NUMBERS = ('f2', 'f4', 'f8', 'i1', 'i2', 'i4', 'i8', 'u1', 'u2', 'u4', 'u8', 'b1')
OPCODES = (     # of protocol 2, which torch.save uses
    'APPEND APPENDS BINFLOAT BINGET BININT BININT1 BININT2 BINPERSID BINPUT BINUNICODE BUILD '
    'EMPTY_DICT EMPTY_LIST EMPTY_SET EMPTY_TUPLE GLOBAL LONG1 LONG_BINGET LONG_BINPUT MARK '
    'NEWFALSE NEWOBJ NEWTRUE NONE PROTO REDUCE SETITEM SETITEMS SHORT_BINSTRING STOP TUPLE TUPLE1 '
    'TUPLE2 TUPLE3')
DTYPES = {f'torch.{name}': dtype for name, dtype in vars(torch).items()
          if isinstance(dtype, torch.dtype)}
STORAGES = {f'{module}.{kind}Storage': dtype for module in ('torch', 'torch.cuda')
            for kind, dtype in dict(
                Double=torch.float64, Float=torch.float32, Half=torch.float16,
                BFloat16=torch.bfloat16, Long=torch.int64, Int=torch.int32, Short=torch.int16,
                Char=torch.int8, Byte=torch.uint8, Bool=torch.bool, ComplexFloat=torch.complex64,
                ComplexDouble=torch.complex128).items()}
STORAGES['torch.storage.UntypedStorage'] = torch.uint8
# ignored in add_safe_globals: the allowed names are above, and other libraries register more
NOT_USERS = ('builtins', 'torch', 'numpy', 'collections', '_codecs', 'mmengine')


@dataclass(frozen=True, eq=False)
class Name:
    """A name in a pickle with the function that builds its value, which a pickle cannot reach."""

    name: str
    make: Any


def _check(good, what):
    if not good:
        raise ValueError(what)


def _key(key):
    """Check that a key is cheap to hash; an untrusted file could choose a costly one."""
    small = isinstance(key, (bool, str, bytes, type(None))) or (
        type(key) is int and abs(key) < 2 ** 60)
    _check(small, f'a key of a dict is a {type(key).__name__}')
    return key


def _pairs(pairs=()):
    return OrderedDict((_key(key), value) for key, value in pairs)


def _counter(counts):
    return Counter({_key(key): int(num) for key, num in counts.items()})


def _set(items=()):
    return {_key(item) for item in items}


def _encode(text, encoding):
    _check(encoding in ('latin1', 'latin-1'), f'bytes are in the encoding {encoding!r}')
    return text.encode('latin1')


def _tensor(storage, offset, size, stride, *_):
    numbers = [offset, *size, *stride]
    last = offset + sum((num - 1) * step for num, step in zip(size, stride, strict=True))
    _check(isinstance(storage, torch.Tensor) and storage.ndim == 1
           and all(type(n) is int and 0 <= n < 2 ** 62 for n in numbers)
           and (0 in size or last < len(storage)) and len(size) < 65 and prod(size) < 2 ** 62,
           'a tensor is larger than its stored bytes')
    return storage.as_strided(size, stride, offset)


def _tensor_v3(storage, offset, size, stride, requires_grad, hooks, dtype, *_):
    return _tensor(storage.view(dtype), offset, size, stride)


def _parameter(tensor, *_):
    return tensor


def _size(size=()):
    _check(all(type(n) is int for n in size), 'a torch.Size is not a sequence of integers')
    return torch.Size(size)


def _dtype(code, *_):
    _check(code in NUMBERS, f'a numpy array holds {str(code)[:20]!r}, and not numbers')
    return np.dtype(code)


def _array(kind, shape, code):
    return np.zeros(0)      # _fill_array sets its content


def _fill_array(array, state):
    _, shape, dtype, fortran, raw = state
    _check(not array.size and isinstance(dtype, np.dtype) and isinstance(raw, bytes)
           and all(type(n) is int and n >= 0 for n in shape) and len(shape) < 33
           and len(raw) == dtype.itemsize * prod(shape),
           'the bytes of a numpy array do not fit its shape')
    array.__setstate__((1, tuple(shape), dtype, bool(fortran), raw))


def _scalar(dtype, raw):
    _check(isinstance(dtype, np.dtype) and len(raw) == dtype.itemsize,
           'the bytes of a numpy number do not fit its dtype')
    return np.frombuffer(raw, dtype)[0]


def _fill_dtype(dtype, state):
    _check(state[1] in ('<', '|', '='), 'a numpy array has the byte order of other machines')


def _statistics(owner, name):
    _check(owner == VALUES[HISTORY], f'getattr is asked for {str(name)[:20]!r} of something else')


def _history(logs=(), counts=(), max_length=1000000):
    logs, counts = (np.asarray(values, 'f8').reshape(-1) for values in (logs, counts))
    return HistoryBuffer(logs, counts, max_length)


def _fill_history(history, state):
    _check(type(state['max_length']) is int and state['max_length'] > 0,
           'a log record has no length')
    vars(history).update(vars(_history(
        *(state[key] for key in ('_log_history', '_count_history', 'max_length')))))


def _fill_ordered(ordered, state):
    """Set ``_metadata`` of a state dict: the version of each module."""
    ordered._metadata = OrderedDict(
        (_key(name), {'version': module['version']}) for name, module in
        state['_metadata'].items() if type(module.get('version')) is int)


HISTORY = 'mmengine.logging.history_buffer.HistoryBuffer'
VALUES = {
    'collections.OrderedDict': _pairs, 'collections.Counter': _counter,
    'torch._utils._rebuild_tensor': _tensor, 'torch._utils._rebuild_tensor_v2': _tensor,
    'torch._utils._rebuild_tensor_v3': _tensor_v3, 'torch._utils._rebuild_parameter': _parameter,
    'torch.Size': _size, 'torch.device': torch.device, '_codecs.encode': _encode,
    'numpy.dtype': _dtype, 'numpy.ndarray': None, HISTORY: _history, **dict.fromkeys(STORAGES)}


for _module in ('builtins', '__builtin__'):
    VALUES |= {f'{_module}.set': _set, f'{_module}.slice': slice, f'{_module}.getattr': _statistics}


for _module in ('numpy.core.multiarray', 'numpy._core.multiarray'):
    VALUES |= {f'{_module}._reconstruct': _array, f'{_module}.scalar': _scalar}


VALUES = {name: Name(name, make) for name, make in VALUES.items()}
FILL = {np.ndarray: _fill_array, HistoryBuffer: _fill_history, OrderedDict: _fill_ordered}


def user_classes() -> dict[str, type]:
    """Classes that the user allowed, by name."""
    pairs = [(item if isinstance(item, tuple) else (item, f'{item.__module__}.{item.__qualname__}'))
             for item in torch.serialization.get_safe_globals()]
    return {name: item for item, name in pairs
            if isinstance(item, type) and name.partition('.')[0] not in NOT_USERS}


class Opcodes(dict):
    """Dispatch table of the allowed opcodes."""

    def __missing__(self, opcode):
        raise pickle.UnpicklingError(f'Unsupported operand {opcode}')


class Unpickler(pickle._Unpickler):
    """Reads a pickle of tensors and plain values.

    Args:
        file (BinaryIO): File, positioned at the pickle.
        storage (Callable, optional): Maps (dtype, key, number of elements) of an entry to its
            content as a vector. Defaults to None: no entries.
        size (int): Size of the file in bytes. Defaults to 0.

    Raises:
        Exception: Of any class, for other files.
    """

    dispatch = Opcodes({code: pickle._Unpickler.dispatch[code] for code in (
        getattr(pickle, name)[0] for name in OPCODES.split())})

    def __init__(self, file: BinaryIO, storage: Callable | None = None, size: int = 0):
        super().__init__(file, encoding='utf-8')
        self.file, self.storage, self.users = file, storage, user_classes()
        self.room = 4 * size + (1 << 20)    # bytes left for all tensors, which may share storage

    def load(self) -> Any:
        """Return the object; reject cyclic, deep and exponentially shared containers."""
        begin = self.file.tell()
        tree = super().load()
        level, left = [tree], 20 * (self.file.tell() - begin)
        for _ in range(MAX_DEPTH):
            level = [node for node in level if isinstance(node, (dict, list, tuple, set))]
            left -= sum(map(len, level))
            if not level or left < 0:
                break
            level = [child for node in level
                     for child in (node.values() if isinstance(node, dict) else node)]
        _check(not level, 'it contains itself, or the same again and again')
        return tree

    def find_class(self, module: str, name: str) -> Any:
        """Return the substitute of a name."""
        name = f'{module}.{name}'
        found = DTYPES.get(name) or VALUES.get(name) or self.users.get(name)
        if found is None:
            raise pickle.UnpicklingError(f'Unsupported global: GLOBAL {name}')
        return found

    def persistent_load(self, pid: tuple) -> torch.Tensor:
        """Return the storage of a tensor."""
        kind, name, key, _, numel, *view = pid
        _check(kind == 'storage' and name.name in STORAGES and type(numel) is int and numel >= 0
               and view in ([], [None]), f'it refers to {str(kind)[:20]!r}')
        return self.storage(STORAGES[name.name], key, numel)

    def make(self, name: Any, args: tuple) -> Any:
        """Build the value of a name and its arguments."""
        if isinstance(name, Name) and name.make and isinstance(args, tuple):
            value = name.make(*args)
        else:
            _check(name in self.users.values(), f'it calls a {type(name).__name__}')
            value = name(*args)
        if isinstance(value, torch.Tensor):
            self.room -= value.numel() * value.element_size()
            _check(self.room >= 0, 'its tensors are larger than the file')
        return value

    def put(self, items: list) -> None:
        """Add keys and values to the dict on the stack."""
        _check(type(self.stack[-1]) in (dict, OrderedDict),
               'it sets an item of something other than a dict')
        self.stack[-1].update((_key(key), value) for key, value in zip(items[::2], items[1::2]))

    def extend(self, items: list) -> None:
        """Add to the list on the stack."""
        _check(type(self.stack[-1]) is list, 'it appends to something other than a list')
        self.stack[-1].extend(items)

    def load_reduce(self):
        args = self.stack.pop()
        self.stack[-1] = self.make(self.stack[-1], args)

    def load_newobj(self):
        args = self.stack.pop()
        name = self.stack[-1]
        self.stack[-1] = name.__new__(name, *args) if name in self.users.values() else (
            self.make(name, args))

    def load_build(self):
        kind = type(self.stack[-2])
        if kind in self.users.values():
            return super().load_build()
        fill = _fill_dtype if issubclass(kind, np.dtype) else FILL.get(kind)
        _check(fill, f'it gives a state to a {kind.__name__}')
        state = self.stack.pop()
        return fill(self.stack[-1], state)

    def load_binunicode(self):
        self.append(str(self.read(int.from_bytes(self.read(4), 'little')), 'utf-8'))

    dispatch.update({
        pickle.REDUCE[0]: load_reduce, pickle.NEWOBJ[0]: load_newobj, pickle.BUILD[0]: load_build,
        pickle.BINUNICODE[0]: load_binunicode,
        pickle.SETITEMS[0]: lambda self: self.put(self.pop_mark()),
        pickle.SETITEM[0]: lambda self: self.put([self.stack.pop(-2), self.stack.pop()]),
        pickle.APPENDS[0]: lambda self: self.extend(self.pop_mark()),
        pickle.APPEND[0]: lambda self: self.extend([self.stack.pop()])})


def safe_load(path: str | Path, map_location: str | torch.device | None = None) -> Any:
    """Read a file of ``torch.save``, of any torch since 1.0.

    The file size bounds memory: entries must be uncompressed, and tensors lie within their entry.

    Args:
        path (str | Path): The file.
        map_location (str | torch.device, optional): Device of the tensors; 'meta' does not read
            them. None and values of other types mean the CPU. Defaults to None.

    Returns:
        Any: The saved object.

    Raises:
        Exception: Of any class, for other files.
    """
    device = map_location if isinstance(map_location, (str, torch.device)) else 'cpu'
    with open(path, 'rb') as file:
        size = file.seek(0, 2)
        file.seek(0)
        read = _read_zip if zipfile.is_zipfile(file) else _read_old
        file.seek(0)
        return read(file, size, device)


def _fill(vector, source):
    """Read a vector's bytes from a file, ``CHUNK`` bytes at a time."""
    left = memoryview(vector.view(torch.uint8).numpy())
    while len(left):
        chunk = source.read(min(len(left), CHUNK))
        _check(chunk, 'it ends early')
        left[:len(chunk)] = chunk
        left = left[len(chunk):]
    return vector


def _read_zip(file, size, device):
    with zipfile.ZipFile(file) as archive:
        entries = {entry.filename: entry for entry in archive.infolist()}
        _check(sum(entry.file_size for entry in archive.infolist()) <= size and
               all(entry.compress_type == zipfile.ZIP_STORED for entry in entries.values()),
               'it is compressed, which torch.save never does')
        root, = (name.removesuffix('data.pkl') for name in entries if name.count('/') == 1
                 and name.endswith('/data.pkl'))
        _check(f'{root}constants.pkl' not in entries, 'it is TorchScript, which is executable')
        order = f'{root}byteorder'
        _check(order not in entries or archive.read(order) == b'little',
               'it has the byte order of other machines')
        vectors = {}

        def storage(dtype, key, numel):
            if key not in vectors:
                entry = entries[f'{root}data/{key}']
                _check(entry.file_size == numel * dtype.itemsize, f'entry {key} has another size')
                if str(device) == 'meta':
                    return torch.empty(numel, dtype=dtype, device=device)
                with archive.open(entry) as source:
                    vectors[key] = _fill(torch.empty(numel, dtype=dtype), source).to(device)
            return vectors[key].view(dtype)

        with archive.open(f'{root}data.pkl') as source:
            return Unpickler(source, storage, size).load()


def _read_old(file, size, device):
    """Read the format of torch before 1.6: five pickles, then the bytes of the tensors."""
    _check(Unpickler(file).load() == MAGIC, 'torch.save did not write it')
    Unpickler(file).load(), Unpickler(file).load()      # versions
    begin, vectors, left = file.tell(), {}, size

    def claim(dtype, key, numel):
        nonlocal left
        if key not in vectors:
            left -= numel * dtype.itemsize
            _check(left >= 0, 'its tensors are larger than the file')
            vectors[key] = torch.empty(numel, dtype=dtype)
        return vectors[key].view(dtype)

    Unpickler(file, claim, size).load()
    keys = Unpickler(file).load()
    _check(set(keys) == set(vectors), 'it lacks tensors')
    for key in keys:
        _check(int.from_bytes(file.read(8), 'little') == len(vectors[key]), 'a tensor is truncated')
        vectors[key] = _fill(vectors[key], file)
    vectors = {key: vector.to(device) for key, vector in vectors.items()}
    file.seek(begin)
    return Unpickler(file, lambda dtype, key, numel: vectors[key].view(dtype), size).load()
