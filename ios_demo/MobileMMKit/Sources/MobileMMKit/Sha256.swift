import Foundation

#if canImport(CryptoKit)
    import CryptoKit

    /// SHA-256, piece by piece.
    struct Sha256 {
        private var hash = SHA256()

        mutating func update(_ bytes: UnsafeRawBufferPointer) { hash.update(bufferPointer: bytes) }

        mutating func finish() -> String { hexadecimal(Array(hash.finalize())) }
    }
#else
    /// SHA-256, piece by piece. Source: FIPS 180-4, sections 5.1.1 and 6.2.
    struct Sha256 {
        private var state: [UInt32] = [
            0x6a09_e667, 0xbb67_ae85, 0x3c6e_f372, 0xa54f_f53a, 0x510e_527f, 0x9b05_688c, 0x1f83_d9ab, 0x5be0_cd19,
        ]
        private var pending: [UInt8] = []
        private var count = 0
        private var schedule = [UInt32](repeating: 0, count: 64)

        /// The first 32 bits of the fractions of the cube roots of the first 64 primes.
        private static let constants: [UInt32] = {
            var found: [UInt32] = []
            var number: UInt64 = 2
            while found.count < 64 {
                if (2..<number).allSatisfy({ number % $0 != 0 || $0 * $0 > number }) {
                    // cbrt(number) · 2³², by whole numbers: the largest r with r³ ≤ number · 2⁹⁶.
                    var root: UInt64 = 0
                    for bit in stride(from: UInt64(35), through: 0, by: -1) {
                        let tried = root | 1 << bit
                        let square = tried.multipliedFullWidth(by: tried)
                        let low = square.low.multipliedFullWidth(by: tried)
                        let high = square.high.multipliedReportingOverflow(by: tried)
                        let upper = high.partialValue.addingReportingOverflow(low.high)
                        if !high.overflow && !upper.overflow && upper.partialValue < number << 32 { root = tried }
                    }
                    found.append(UInt32(truncatingIfNeeded: root))
                }
                number += 1
            }
            return found
        }()

        mutating func update(_ bytes: UnsafeRawBufferPointer) {
            count += bytes.count
            var start = 0
            if !pending.isEmpty {
                start = min(64 - pending.count, bytes.count)
                pending += bytes[..<start]
                if pending.count < 64 { return }
                let block = pending
                block.withUnsafeBytes { compress($0) }
                pending.removeAll(keepingCapacity: true)
            }
            while start + 64 <= bytes.count {
                compress(UnsafeRawBufferPointer(rebasing: bytes[start..<start + 64]))
                start += 64
            }
            pending += bytes[start...]
        }

        mutating func finish() -> String {
            let bits = UInt64(count) * 8
            var tail: [UInt8] = [0x80]
            tail += [UInt8](repeating: 0, count: (119 - count % 64) % 64)
            tail += (0..<8).map { UInt8(truncatingIfNeeded: bits >> (56 - 8 * UInt64($0))) }
            tail.withUnsafeBytes { update($0) }
            return hexadecimal(state.flatMap { word in (0..<4).map { UInt8(truncatingIfNeeded: word >> (24 - 8 * UInt32($0))) } })
        }

        private mutating func compress(_ block: UnsafeRawBufferPointer) {
            func right(_ word: UInt32, _ bits: UInt32) -> UInt32 { word >> bits | word << (32 - bits) }
            schedule.withUnsafeMutableBufferPointer { words in
                Self.constants.withUnsafeBufferPointer { constants in
                    for index in 0..<16 {
                        words[index] = UInt32(bigEndian: block.loadUnaligned(fromByteOffset: 4 * index, as: UInt32.self))
                    }
                    for index in 16..<64 {
                        let (two, fifteen) = (words[index - 2], words[index - 15])
                        let one = right(two, 17) ^ right(two, 19) ^ two >> 10
                        let other = right(fifteen, 7) ^ right(fifteen, 18) ^ fifteen >> 3
                        words[index] = one &+ words[index - 7] &+ other &+ words[index - 16]
                    }
                    var (a, b, c, d) = (state[0], state[1], state[2], state[3])
                    var (e, f, g, h) = (state[4], state[5], state[6], state[7])
                    for index in 0..<64 {
                        let sums = right(e, 6) ^ right(e, 11) ^ right(e, 25)
                        let first = h &+ sums &+ (e & f ^ ~e & g) &+ constants[index] &+ words[index]
                        let second = (right(a, 2) ^ right(a, 13) ^ right(a, 22)) &+ (a & b ^ a & c ^ b & c)
                        (h, g, f, e, d, c, b, a) = (g, f, e, d &+ first, c, b, a, first &+ second)
                    }
                    for (index, word) in [a, b, c, d, e, f, g, h].enumerated() { state[index] &+= word }
                }
            }
        }
    }
#endif

extension Sha256 {
    static func of(_ bytes: [UInt8]) -> String {
        var hash = Sha256()
        bytes.withUnsafeBytes { hash.update($0) }
        return hash.finish()
    }
}

func hexadecimal(_ bytes: [UInt8]) -> String {
    bytes.map { ($0 < 16 ? "0" : "") + String($0, radix: 16) }.joined()
}
