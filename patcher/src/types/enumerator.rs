//! Constants of enumerations that have no name, such as ftrace's flags.

use super::{Kind, TypeError, Types, no_member};

impl Types {
    /// The value of the constant `name`, whichever enumeration it is in. Slower than
    /// [`Types::constant`]: it looks through all types.
    ///
    /// # Errors
    /// [`TypeError::NoMember`] when no enumeration has it, [`TypeError::Ambiguous`] when several
    /// have it with different values.
    pub fn enumerator(&self, name: &str) -> Result<i64, TypeError> {
        let mut found = None;
        let first = self.first();
        for number in 0..self.starts.len() {
            let Ok(record) = u32::try_from(number)
                .map_err(drop)
                .and_then(|number| self.record(first.saturating_add(number)).map_err(drop))
            else {
                continue;
            };
            if !matches!(record.kind, Kind::Enum | Kind::Enum64) {
                continue;
            }
            for (_, value) in record
                .enumerators()
                .filter(|&(named, _)| self.string(named) == name.as_bytes())
            {
                if found.is_some_and(|found| found != value) {
                    return Err(TypeError::Ambiguous {
                        name: name.to_owned(),
                        count: 2,
                    });
                }
                found = Some(value);
            }
        }
        match (&self.base, found) {
            (_, Some(found)) => Ok(found),
            (Some(base), None) => base.enumerator(name),
            (None, None) => Err(no_member("enumerations", name)),
        }
    }
}
