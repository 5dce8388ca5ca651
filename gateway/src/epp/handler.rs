//! The profile handler of a file: one profile, or decode and prefill.

use super::catalogue::Part;
use super::map::Mapper;
use crate::core::config::{DisaggregationConfig, Parameters, PluginConfig, ProfileConfig, StageOrder};
use crate::core::scheduler::parameters::{PluginError, Reader};

/// What `disagg-profile-handler` is told.
struct Told {
    decode: String,
    prefill: String,
    prefill_decider: String,
    encode_decider: String,
    order: StageOrder,
}

/// The profile that chooses the endpoint and, if there is one, the profile that chooses the prefill endpoint.
pub(super) fn handler(
    m: &mut Mapper<'_>,
    mut profiles: Vec<ProfileConfig>,
) -> (ProfileConfig, Option<DisaggregationConfig>) {
    let is_handler = |part| matches!(part, Some(Part::SingleHandler | Part::DisaggregatedHandler));
    let handlers: Vec<usize> = (0..m.declared.len()).filter(|&i| is_handler(m.declared[i].part)).collect();
    if let [_, second, ..] = handlers[..] {
        let path = format!("{}.type", m.declared[second].path);
        m.problems.add(&path, "a second profile handler", "one profile handler");
    }
    let disaggregated = handlers.first().filter(|&&i| m.declared[i].part == Some(Part::DisaggregatedHandler));
    if let Some(&i) = disaggregated {
        return disaggregation(m, i, profiles);
    }
    if profiles.len() > 1 {
        let found = format!("{} profiles", profiles.len());
        let expected = "one profile, or disagg-profile-handler among the plugins";
        m.problems.add("schedulingProfiles", found, expected);
    }
    (profiles.swap_remove(0), None)
}

fn disaggregation(
    m: &mut Mapper<'_>,
    i: usize,
    profiles: Vec<ProfileConfig>,
) -> (ProfileConfig, Option<DisaggregationConfig>) {
    let path = m.declared[i].path.clone();
    let told = match read(&m.declared[i].kind, &m.declared[i].parameters) {
        Ok(told) => told,
        Err(error) => {
            m.refuse(&path, error);
            return Default::default();
        }
    };
    let named = |name: &str| profiles.iter().find(|p| p.name == name).cloned();
    let Some(decode) = named(&told.decode) else {
        let names: Vec<&str> = profiles.iter().map(|p| p.name.as_str()).collect();
        let expected = format!("a profile {:?}, which decodes", told.decode);
        m.problems.add("schedulingProfiles", format!("the profiles {}", names.join(", ")), expected);
        return Default::default();
    };
    if !told.encode_decider.is_empty() {
        let instead = "no decider: nothing is encoded by an endpoint of its own";
        m.unsupported(&format!("{path}.parameters.deciders.encode"), &format!("{:?}", told.encode_decider), instead);
    }
    for other in profiles.iter().filter(|p| p.name != told.decode && p.name != told.prefill) {
        m.warnings.push(format!("schedulingProfiles: {:?} never runs", other.name));
    }
    let decider = decider(m, &path, &told);
    let disaggregation = named(&told.prefill).zip(decider).map(|(profile, decider)| {
        let stage_order = told.order;
        DisaggregationConfig { profile, decider, stage_order }
    });
    if disaggregation.is_none() && m.problems.is_empty() {
        m.warn(&path, "without a prefill profile and a decider the endpoint that decodes does it all");
    }
    (decode, disaggregation)
}

/// The decider; prefill first needs none, and llm-d refuses one.
fn decider(m: &mut Mapper<'_>, path: &str, told: &Told) -> Option<PluginConfig> {
    let path = format!("{path}.parameters.deciders.prefill");
    match (told.order, told.prefill_decider.as_str()) {
        (StageOrder::PrefillFirst, "") => Some(PluginConfig::of("always-disagg-pd-decider")),
        (StageOrder::PrefillFirst, name) => {
            m.problems.add(&path, format!("{name:?}"), "no decider where prefill comes first");
            None
        }
        (StageOrder::DecodeFirst, "") => None,
        (StageOrder::DecodeFirst, name) => {
            let i = m.find(&path, name)?;
            if m.declared[i].part != Some(Part::Decider) {
                m.problems.add(&path, format!("{name:?}"), "the name of a decider");
                return None;
            }
            Some(m.config(i))
        }
    }
}

fn read(kind: &str, parameters: &Parameters) -> Result<Told, PluginError> {
    const FLAT: [&str; 6] = [
        "decodeProfile",
        "prefillProfile",
        "encodeProfile",
        "prefillDeciderPluginName",
        "encodeDeciderPluginName",
        "deciderPluginName",
    ];
    if kind == "pd-profile-handler" || FLAT.iter().any(|f| parameters.contains_key(*f)) {
        Reader::all(parameters, flat)
    } else {
        Reader::all(parameters, nested)
    }
}

fn nested(p: &mut Reader<'_>) -> Result<Told, PluginError> {
    let order = order(p)?;
    let (decode, prefill) = p.nested("profiles", |p| {
        p.ignored("encode");
        Ok((p.text_or("decode", "decode")?, p.text_or("prefill", "prefill")?))
    })?;
    let (prefill_decider, encode_decider) =
        p.nested("deciders", |p| Ok((p.text("prefill")?.to_owned(), p.text("encode")?.to_owned())))?;
    Ok(Told { decode, prefill, prefill_decider, encode_decider, order })
}

/// The deprecated form, also that of `pd-profile-handler`.
fn flat(p: &mut Reader<'_>) -> Result<Told, PluginError> {
    let order = order(p)?;
    for name in ["encodeProfile", "prefixPluginType", "prefixPluginName", "primaryPort", "prefixMatchInfoProducerName"]
    {
        p.ignored(name);
    }
    let older = p.text("deciderPluginName")?.to_owned();
    let newer = p.text("prefillDeciderPluginName")?.to_owned();
    Ok(Told {
        decode: p.text_or("decodeProfile", "decode")?,
        prefill: p.text_or("prefillProfile", "prefill")?,
        prefill_decider: if newer.is_empty() { older } else { newer },
        encode_decider: p.text("encodeDeciderPluginName")?.to_owned(),
        order,
    })
}

fn order(p: &mut Reader<'_>) -> Result<StageOrder, PluginError> {
    let word: String = p.text("stageOrder")?.to_ascii_lowercase().replace(['-', '_'], "");
    match word.as_str() {
        "" | "decodefirst" | "decode" => Ok(StageOrder::DecodeFirst),
        "prefillfirst" | "prefill" => Ok(StageOrder::PrefillFirst),
        _ => Err(p.refuse("stageOrder", "decode-first or prefill-first")),
    }
}
