import Foundation

/// Noise from a seed: the rule by which every language draws the same picture.
///
/// The bits are those of Philox4x32-10 (Salmon et al. 2011, "Parallel random numbers: as easy as 1, 2, 3"), a
/// counter-based generator: block i depends on the seed and on i alone. Two 32-bit words make two normal numbers by
/// Box and Muller, in double precision, then rounded to float32. `docs/noise.md` has the rule in full, with vectors.
public enum Noise {
    /// The rule's name in a manifest.
    public static let rule = "philox4x32-10-box-muller"
    /// Numbers for one picture; Stable Diffusion takes 2^16 at 1024 pixels.
    static let most = 1 << 26

    /// Independent numbers of mean 0 and variance 1, the same for the same seed; a longer shape goes on.
    public static func normal(seed: UInt64, _ shape: [Int]) throws -> Tensor {
        let tensor = try Tensor(.float32, shape)
        let values = tensor.floats
        let key = (UInt32(truncatingIfNeeded: seed), UInt32(truncatingIfNeeded: seed >> 32))
        for start in stride(from: 0, to: values.count, by: 4) {
            let block = UInt64(start / 4)
            let words = philox((UInt32(truncatingIfNeeded: block), UInt32(truncatingIfNeeded: block >> 32), 0, 0), key)
            let numbers = pair(words.0, words.1) + pair(words.2, words.3)
            for (index, number) in numbers.prefix(values.count - start).enumerated() { values[start + index] = Float(number) }
        }
        return tensor
    }

    /// (0, 1] for the radius, so that its logarithm is finite; [0, 1) for the angle.
    private static func pair(_ one: UInt32, _ other: UInt32) -> [Double] {
        let radius = (-2 * log((Double(one) + 1) / 0x1p32)).squareRoot()
        let angle = 2 * Double.pi * (Double(other) / 0x1p32)
        return [radius * cos(angle), radius * sin(angle)]
    }

    /// Philox4x32-10: four words for each counter, the counter's lowest word first.
    static func philox(
        _ counter: (UInt32, UInt32, UInt32, UInt32), _ key: (UInt32, UInt32)
    ) -> (UInt32, UInt32, UInt32, UInt32) {
        var (counter, key) = (counter, key)
        for _ in 0..<10 {
            let first = counter.0.multipliedFullWidth(by: 0xD251_1F53)
            let second = counter.2.multipliedFullWidth(by: 0xCD9E_8D57)
            counter = (second.high ^ counter.1 ^ key.0, second.low, first.high ^ counter.3 ^ key.1, first.low)
            key = (key.0 &+ 0x9E37_79B9, key.1 &+ 0xBB67_AE85)
        }
        return counter
    }
}
