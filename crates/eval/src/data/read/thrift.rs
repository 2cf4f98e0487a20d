//! As much of Thrift's compact protocol as it takes to look at a Parquet file's footer and page headers before the
//! Parquet reader allocates and recurses by them.
//! <https://github.com/apache/thrift/blob/master/doc/specs/thrift-compact-protocol.md>

/// Structures inside of each other, at most.
const MAX_DEPTH: usize = 32;

/// The types of the protocol, as it numbers them.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Kind {
    Bool,
    Byte,
    Integer,
    Double,
    Binary,
    List,
    Map,
    Struct,
    Uuid,
}

impl Kind {
    fn of(code: u8) -> Option<Self> {
        Some(match code {
            1 | 2 => Self::Bool,
            3 => Self::Byte,
            4..=6 => Self::Integer,
            7 => Self::Double,
            8 => Self::Binary,
            9 | 10 => Self::List,
            11 => Self::Map,
            12 => Self::Struct,
            13 => Self::Uuid,
            _ => return None,
        })
    }
}

/// Reads a structure from the beginning of bytes. Everything is `None` where the bytes end or are no Thrift.
#[derive(Debug, Clone)]
pub(super) struct Reader<'a> {
    bytes: &'a [u8],
}

impl<'a> Reader<'a> {
    pub(super) fn new(bytes: &'a [u8]) -> Self {
        Self { bytes }
    }

    fn byte(&mut self) -> Option<u8> {
        let (&first, rest) = self.bytes.split_first()?;
        self.bytes = rest;
        Some(first)
    }

    fn pass(&mut self, count: usize) -> Option<()> {
        self.bytes = self.bytes.get(count..)?;
        Some(())
    }

    fn varint(&mut self) -> Option<u64> {
        let mut value = 0;
        for shift in (0..64).step_by(7) {
            let byte = self.byte()?;
            value |= u64::from(byte & 0x7f) << shift;
            if byte & 0x80 == 0 {
                return Some(value);
            }
        }
        None
    }

    /// An integer of 16, 32 or 64 bits.
    pub(super) fn integer(&mut self) -> Option<i64> {
        let zigzag = self.varint()?;
        Some((zigzag >> 1) as i64 ^ -((zigzag & 1) as i64))
    }

    /// A length that the rest of the bytes can hold.
    fn length(&mut self) -> Option<usize> {
        usize::try_from(self.varint()?).ok().filter(|&n| n <= self.bytes.len())
    }

    /// The kind and the number of the entries of a list, which has no more than bytes are left.
    pub(super) fn list(&mut self) -> Option<(Kind, usize)> {
        let head = self.byte()?;
        let count = if head >> 4 == 15 { self.length()? } else { usize::from(head >> 4) };
        (count <= self.bytes.len()).then_some((Kind::of(head & 15)?, count))
    }

    /// The identifier and the kind of a structure's next field, where the one before it had `last`; `None` inside at its
    /// end.
    pub(super) fn field(&mut self, last: i64) -> Option<Option<(i64, Kind)>> {
        let head = self.byte()?;
        if head == 0 {
            return Some(None);
        }
        let id = match head >> 4 {
            0 => self.integer()?,
            step => last + i64::from(step),
        };
        Some(Some((id, Kind::of(head & 15)?)))
    }

    /// Passes over a value. `in_list`: where a boolean has a byte of its own.
    pub(super) fn skip(&mut self, kind: Kind, in_list: bool) -> Option<()> {
        self.skip_within(kind, in_list, MAX_DEPTH)
    }

    fn skip_within(&mut self, kind: Kind, in_list: bool, depth: usize) -> Option<()> {
        let depth = depth.checked_sub(1)?;
        match kind {
            Kind::Bool => self.pass(usize::from(in_list)),
            Kind::Byte => self.pass(1),
            Kind::Integer => self.varint().map(|_| ()),
            Kind::Double => self.pass(8),
            Kind::Uuid => self.pass(16),
            Kind::Binary => {
                let length = self.length()?;
                self.pass(length)
            }
            Kind::List => {
                let (kind, count) = self.list()?;
                (0..count).try_for_each(|_| self.skip_within(kind, true, depth))
            }
            Kind::Map => {
                let count = self.length()?;
                if count == 0 {
                    return Some(());
                }
                let kinds = self.byte()?;
                let (key, value) = (Kind::of(kinds >> 4)?, Kind::of(kinds & 15)?);
                (0..count).try_for_each(|_| {
                    self.skip_within(key, true, depth)?;
                    self.skip_within(value, true, depth)
                })
            }
            Kind::Struct => {
                let mut last = 0;
                while let Some((id, kind)) = self.field(last)? {
                    self.skip_within(kind, false, depth)?;
                    last = id;
                }
                Some(())
            }
        }
    }
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::*;

    #[test]
    fn a_structure_is_read_and_passed_over() {
        // {1: i32 -3, 2: "ab", 20: [true, false], 21: {1: true}}, and a byte behind it.
        let bytes = [0x15, 5, 0x18, 2, b'a', b'b', 9, 40, 0x21, 1, 2, 0x1c, 0x11, 0, 0, 7];
        let mut reader = Reader::new(&bytes);
        assert_eq!(reader.field(0), Some(Some((1, Kind::Integer))));
        assert_eq!(reader.integer(), Some(-3));
        assert_eq!(reader.field(1), Some(Some((2, Kind::Binary))));
        let mut whole = Reader::new(&bytes);
        whole.skip(Kind::Struct, false).unwrap();
        assert_eq!(whole.bytes, [7]);
        for end in 0..bytes.len() - 1 {
            assert_eq!(Reader::new(&bytes[..end]).skip(Kind::Struct, false), None, "{end}");
        }
    }

    #[test]
    fn lengths_and_depths_are_bounded() {
        let list = [0xfc, 0xff, 0xff, 0xff, 0xff, 0x0f];
        assert_eq!(Reader::new(&list).list(), None);
        let nested = vec![0x1c; 1 << 20];
        assert_eq!(Reader::new(&nested).skip(Kind::Struct, false), None);
    }
}
