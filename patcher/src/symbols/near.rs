//! Names that are spelled nearly as one that does not exist.

use super::Symbols;

/// How many are offered.
const MOST: usize = 3;

/// The names closest to `wanted`, closest first; none when nothing is close.
pub(super) fn names(symbols: &Symbols, wanted: &str) -> Vec<String> {
    // A name of this length is not a slip of the finger, and comparing takes time.
    if wanted.len() > 64 || wanted.len() < 3 {
        return Vec::new();
    }
    let allowed = (wanted.len() / 4).clamp(1, 3);
    let mut near: Vec<(usize, String)> = Vec::new();
    for symbol in symbols.iter() {
        let name = symbol.with_name(|name| {
            let close = name.len().abs_diff(wanted.len()) <= allowed;
            // Compilers add suffixes: `name.constprop.0`, `name.isra.0`.
            let suffixed = name
                .strip_prefix(wanted.as_bytes())
                .is_some_and(|s| s.first() == Some(&b'.'));
            (close || suffixed).then(|| (suffixed, String::from_utf8_lossy(name).into_owned()))
        });
        let Some((suffixed, name)) = name else {
            continue;
        };
        let distance = if suffixed {
            0
        } else {
            strsim::osa_distance(&name, wanted)
        };
        if distance <= allowed && !near.iter().any(|(_, known)| *known == name) {
            near.push((distance, name));
            near.sort();
            near.truncate(MOST);
        }
    }
    near.into_iter().map(|(_, name)| name).collect()
}
