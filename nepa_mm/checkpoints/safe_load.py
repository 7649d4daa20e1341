"""Read what ``torch.save`` wrote as tensors and plain values: nothing in it is ever called.

``torch.load(weights_only=True)`` lets a pickle call the names of a list. Some of those call what
they are given, or take as much memory as they are told; mmengine adds ``getattr``; torch before 2.6
runs TorchScript and believes every size. Here a name in a pickle becomes a :class:`Name`, which
cannot be called, and ``VALUES`` is the one list of what a name and its arguments may become, the
same for every torch, mmengine and numpy:

========================================  ========================================================
name                                      what it gives, and why that is harmless
========================================  ========================================================
torch._utils._rebuild_tensor, _v2, _v3    a view within the bytes of its own entry of the file
torch._utils._rebuild_parameter           the tensor that it is given
torch.FloatStorage and its kind           nothing by itself; names the dtype of an entry
torch.float32 and its kind                a dtype
torch.Size, torch.device                  integers; a name
_codecs.encode                            the bytes of a latin-1 text, of the same length
OrderedDict, Counter, set, slice          plain values; keys are texts and small integers
numpy dtype, ndarray, scalar              numbers of a fixed width whose bytes are in the file
HistoryBuffer                             a log record of two such arrays
getattr                                   None: statistics of HistoryBuffer, which has them itself
========================================  ========================================================

Beyond these there are the classes that a user allowed by ``torch.serialization.add_safe_globals``.
"""
import pickle
import zipfile
from collections import Counter, OrderedDict
from dataclasses import dataclass
from math import prod
from typing import Any

import numpy as np
import torch
from mmengine.logging import HistoryBuffer

MAX_DEPTH = 50      # of containers in each other
CHUNK = 1 << 24     # bytes read at a time
MAGIC = 0x1950a86a20f9469cfc6c      # how files of torch before 1.6 begin
NUMBERS = ('f2', 'f4', 'f8', 'i1', 'i2', 'i4', 'i8', 'u1', 'u2', 'u4', 'u8', 'b1')
OPCODES = (     # those of protocol 2, which torch.save writes
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
# modules whose names a user need not allow: theirs are above, and other libraries allow more
NOT_USERS = ('builtins', 'torch', 'numpy', 'collections', '_codecs', 'mmengine')


@dataclass(frozen=True, eq=False)
class Name:
    """A name in a pickle, and what makes a value of it; nothing that a pickle can do opens it."""

    name: str
    make: Any


def _check(good, what):
    if not good:
        raise ValueError(what)


def _key(key):
    """A key that hashes in no time, whoever chose it."""
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
           'a tensor is larger than what is stored of it')
    return storage.as_strided(size, stride, offset)


def _tensor_v3(storage, offset, size, stride, requires_grad, hooks, dtype, *_):
    return _tensor(storage.view(dtype), offset, size, stride)


def _parameter(tensor, *_):
    return tensor


def _size(size=()):
    _check(all(type(n) is int for n in size), 'a torch.Size is no sequence of integers')
    return torch.Size(size)


def _dtype(code, *_):
    _check(code in NUMBERS, f'a numpy array holds {str(code)[:20]!r}, and not numbers')
    return np.dtype(code)


def _array(kind, shape, code):
    return np.zeros(0)      # what it holds comes by _fill_array


def _fill_array(array, state):
    _, shape, dtype, fortran, raw = state
    _check(not array.size and isinstance(dtype, np.dtype) and isinstance(raw, bytes)
           and all(type(n) is int and n >= 0 for n in shape) and len(shape) < 33
           and len(raw) == dtype.itemsize * prod(shape), 'a numpy array has other bytes than shape')
    array.__setstate__((1, tuple(shape), dtype, bool(fortran), raw))


def _scalar(dtype, raw):
    _check(isinstance(dtype, np.dtype) and len(raw) == dtype.itemsize,
           'a numpy number has other bytes than dtype')
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
    """``_metadata`` of a state dict: the version of each module."""
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


def users():
    """The classes that the user allowed: {name: class}."""
    pairs = [(item if isinstance(item, tuple) else (item, f'{item.__module__}.{item.__qualname__}'))
             for item in torch.serialization.get_safe_globals()]
    return {name: item for item, name in pairs
            if isinstance(item, type) and name.partition('.')[0] not in NOT_USERS}


class Opcodes(dict):
    """Those of a dispatch table that are allowed."""

    def __missing__(self, opcode):
        raise pickle.UnpicklingError(f'Unsupported operand {opcode}')


class Unpickler(pickle._Unpickler):
    """A pickle of tensors and plain values.

    Args:
        file (BinaryIO): Where the pickle begins.
        storage (Callable): Gives the bytes of an entry as a vector, for its dtype, key and number
            of elements. Defaults to None: there are none.
        size (int): Bytes of the whole file. Defaults to 0.

    Raises:
        Exception: Of any kind, for a file that is something else.
    """

    dispatch = Opcodes({code: pickle._Unpickler.dispatch[code] for code in (
        getattr(pickle, name)[0] for name in OPCODES.split())})

    def __init__(self, file, storage=None, size=0):
        super().__init__(file, encoding='utf-8')
        self.file, self.storage, self.users = file, storage, users()
        self.room = 4 * size + (1 << 20)    # for all tensors, which may share their bytes

    def load(self):
        """The object, a tree that ends and can be walked in no time."""
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

    def find_class(self, module, name):
        """What stands for a name."""
        name = f'{module}.{name}'
        found = DTYPES.get(name) or VALUES.get(name) or self.users.get(name)
        if found is None:
            raise pickle.UnpicklingError(f'Unsupported global: GLOBAL {name}')
        return found

    def persistent_load(self, pid):
        """The bytes of a tensor."""
        kind, name, key, _, numel, *view = pid
        _check(kind == 'storage' and name.name in STORAGES and type(numel) is int and numel >= 0
               and view in ([], [None]), f'it refers to {str(kind)[:20]!r}')
        return self.storage(STORAGES[name.name], key, numel)

    def make(self, name, args):
        """The value of a name and its arguments."""
        if isinstance(name, Name) and name.make and isinstance(args, tuple):
            value = name.make(*args)
        else:
            _check(name in self.users.values(), f'it calls a {type(name).__name__}')
            value = name(*args)
        if isinstance(value, torch.Tensor):
            self.room -= value.numel() * value.element_size()
            _check(self.room >= 0, 'its tensors are larger than the file')
        return value

    def put(self, items):
        """Add keys and values to the dict on the stack."""
        _check(type(self.stack[-1]) in (dict, OrderedDict), 'it sets an item of no dict')
        self.stack[-1].update((_key(key), value) for key, value in zip(items[::2], items[1::2]))

    def extend(self, items):
        """Add to the list on the stack."""
        _check(type(self.stack[-1]) is list, 'it appends to no list')
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


def safe_load(path, map_location=None):
    """Read a file of ``torch.save``, of any torch since 1.0.

    Memory is bounded by the size of the file: entries are stored uncompressed, and every tensor
    lies within its entry.

    Args:
        path (str): The file.
        map_location (str | torch.device, optional): Device of the tensors; 'meta' does not read
            them. Defaults to None, and anything else means the CPU.

    Returns:
        Any: What was saved.

    Raises:
        Exception: Of any kind, for a file that is something else.
    """
    device = map_location if isinstance(map_location, (str, torch.device)) else 'cpu'
    with open(path, 'rb') as file:
        size = file.seek(0, 2)
        file.seek(0)
        read = _read_zip if zipfile.is_zipfile(file) else _read_old
        file.seek(0)
        return read(file, size, device)


def _fill(vector, source):
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
        _check(f'{root}constants.pkl' not in entries, 'it is TorchScript, which is a program')
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
    """The format of torch before 1.6: five pickles, then the bytes of the tensors."""
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
        _check(int.from_bytes(file.read(8), 'little') == len(vectors[key]), 'a tensor is cut')
        vectors[key] = _fill(vectors[key], file)
    vectors = {key: vector.to(device) for key, vector in vectors.items()}
    file.seek(begin)
    return Unpickler(file, lambda dtype, key, numel: vectors[key].view(dtype), size).load()
