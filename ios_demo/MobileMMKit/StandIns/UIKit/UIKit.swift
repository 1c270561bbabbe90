// A stand-in for Apple's module of this name: signatures of what is used, for the type checker alone.
@_exported import CoreGraphics
@_exported import Foundation

open class UIImage: NSObject, @unchecked Sendable {
    public func jpegData(compressionQuality: CGFloat) -> Data? { fatalError() }
}
@MainActor open class UIResponder: NSObject {
    public override nonisolated init() { fatalError() }
}
@MainActor open class UIViewController: UIResponder {}
@MainActor open class UINavigationController: UIViewController {}
@MainActor public protocol UINavigationControllerDelegate: NSObjectProtocol {}
@MainActor public protocol UIImagePickerControllerDelegate: NSObjectProtocol {
    func imagePickerController(
        _ picker: UIImagePickerController, didFinishPickingMediaWithInfo info: [UIImagePickerController.InfoKey: Any])
    func imagePickerControllerDidCancel(_ picker: UIImagePickerController)
}
@MainActor open class UIImagePickerController: UINavigationController {
    public enum SourceType: Int, Sendable { case photoLibrary, camera, savedPhotosAlbum }
    public struct InfoKey: Hashable, RawRepresentable, Sendable {
        public let rawValue: String
        public init(rawValue: String) { fatalError() }
        public static let originalImage = InfoKey(rawValue: "")
    }
    open class func isSourceTypeAvailable(_ sourceType: SourceType) -> Bool { fatalError() }
    open var sourceType: SourceType { get { fatalError() } set { fatalError() } }
    open weak var delegate: (any UIImagePickerControllerDelegate & UINavigationControllerDelegate)? {
        get { fatalError() }
        set { fatalError() }
    }
}
